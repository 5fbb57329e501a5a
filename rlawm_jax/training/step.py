"""The jitted training step for any subset of {image_decoder, rla, denoiser}.

Tokens of the batch are computed once and every active objective reads them. Each objective is differentiated with
respect to its own part only and has its own optimizer, so joint and staged training are the same program: an objective
outside its steps leaves its parameters, moments and schedule unchanged.

With `config.train.accumulate` > 1 the batch is processed in that many micro-batches, one after the other, and gradients
and metrics are their means. These equal those of the whole batch up to the order of float32 sums and the noise, which
each micro-batch draws from a separate stream.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from rlawm_jax import latent_scale
from rlawm_jax.objectives import LOSSES, Z_MOMENTS, Objective, TokenBatch
from rlawm_jax.rng import stream
from rlawm_jax.sharding import batch_sharding, micro_batches, on_mesh, replicated, tree_shardings
from rlawm_jax.training.optimizer import make_optimizer
from rlawm_jax.training.state import TrainState, join_model
from rlawm_jax.world_model import PARTS, WorldModel

# settings of an objective that are not loss weights
NOT_WEIGHTS = ("enabled", "start_step", "stop_step", "lr_scale", "adam_scale")

Metrics = dict[str, Array]
# (state, frozen, batch) -> (state, metrics); the state is a world model's TrainState or a policy's
TrainStep = Callable[[Any, nnx.State, dict[str, Array]], tuple[Any, Metrics]]


def make_objectives(config: ConfigDict) -> dict[str, Objective]:
    """The enabled objectives of a config, by part, in a fixed order."""
    objectives = {}
    for part in PARTS:
        settings = config.objectives[part]
        if not settings.enabled:
            continue
        weights = {k: v for k, v in settings.items() if k not in NOT_WEIGHTS}
        if part == "denoiser":
            weights["time_schedule"] = config.denoiser.time_schedule
        if part == "image_decoder":  # its bound applies to the whole batch
            weights["max_images"] = -(-settings.max_images // config.train.accumulate)
        stop = settings.stop_step or config.train.steps
        if not 0 <= settings.start_step < stop:
            raise ValueError(
                f"config.objectives.{part}: expected 0 <= start_step < stop_step (or train.steps), "
                f"found start_step={settings.start_step}, stop={stop}"
            )
        objectives[part] = Objective(part, partial(LOSSES[part], **weights), settings.start_step, settings.stop_step)
    if not objectives:
        raise ValueError(f"config.objectives: expected at least one of {', '.join(PARTS)} enabled, found none")
    return objectives


def make_transforms(config: ConfigDict, objectives: dict[str, Objective]) -> dict[str, optax.GradientTransformation]:
    """One optimizer per objective, with its schedule over the objective's steps."""
    return {
        part: make_optimizer(
            config.optimizer,
            o.start_step,
            o.stop_step or config.train.steps,
            lr_scale=config.objectives[part].lr_scale,
            adam_scale=config.objectives[part].adam_scale,
        )
        for part, o in objectives.items()
    }


def token_batch(model: WorldModel, batch: dict[str, Array]) -> TokenBatch:
    """Cached tokens unchanged, or the backbone's tokens of both frames in one pass; no gradient either way."""
    frames = batch.get("frames")
    images = None if frames is None else frames.astype(jnp.float32) / 255.0
    if "tokens" in batch:
        tokens = batch["tokens"].astype(jnp.float32)
    elif frames is not None:
        # both frames of a window stay adjacent: putting all first frames first would move them between devices
        flat = model.encode(frames.reshape(-1, *frames.shape[2:]))
        tokens = flat.reshape(-1, 2, *flat.shape[1:])
    else:
        raise ValueError(f"batch: expected frames or tokens, found {', '.join(batch)}")
    s0, s1 = jnp.unstack(tokens, axis=1)
    return TokenBatch(s0, s1, batch["actions"], batch["num_actions"], batch["robot_id"], images)


def _mean(fn: Callable[[TokenBatch, Array], Any], batch: TokenBatch, key: Array, parts: int) -> Any:
    """fn(batch, key), or the mean over the micro-batches on the leading axis of `batch`, each with its own key."""
    if parts == 1:
        return fn(batch, key)

    def add(total: Any, item: tuple[Array, TokenBatch]) -> tuple[Any, None]:
        i, micro = item
        return jax.tree.map(jnp.add, total, fn(micro, stream(key, "micro_batch", i))), None

    shapes = jax.eval_shape(lambda: fn(jax.tree.map(lambda x: x[0], batch), key))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total = jax.lax.scan(add, start, (jnp.arange(parts), batch))[0]
    return jax.tree.map(lambda x: x / parts, total)


def make_train_step(
    graphdef: nnx.GraphDef,
    objectives: dict[str, Objective],
    transforms: dict[str, optax.GradientTransformation],
    *,
    seed: int,
    running_latent_scale: bool,
    accumulate: int = 1,
) -> TrainStep:
    """The training step as a pure function (state, frozen, batch) -> (state, metrics); jit it with `jit_train_step`.

    Metrics are float32 scalars `part/name`, among them loss, gradient norm, parameter norm and `finite` (1 if loss and
    gradients are finite); an objective outside its steps reports zeros and `finite` 1.
    """

    def update(objective: Objective, state: TrainState, frozen: nnx.State, batch: TokenBatch, key: Array):
        part = objective.part

        def loss_of(own: nnx.State, micro: TokenBatch, key: Array) -> tuple[Array, Metrics]:
            model = join_model(graphdef, {**state.params, part: own}, frozen, state.latent_scale)
            return objective.loss(model, micro, key)

        gradient = partial(jax.value_and_grad(loss_of, has_aux=True), state.params[part])
        (loss, metrics), grads = _mean(gradient, batch, key, accumulate)
        updates, opt_state = transforms[part].update(grads, state.opt_state[part], state.params[part])
        params = optax.apply_updates(state.params[part], updates)
        grad_norm = optax.global_norm(grads)
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.global_norm(params),
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        return params, opt_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    def step(state: TrainState, frozen: nnx.State, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        model = join_model(graphdef, state.params, frozen, state.latent_scale)
        tokens_of = partial(token_batch, model)
        # micro-batches one by one here too, so that only one of them holds backbone activations at a time
        tokens = tokens_of(batch) if accumulate == 1 else jax.lax.map(tokens_of, micro_batches(batch, accumulate))
        params: dict[str, Any] = dict(state.params)
        opt_state, metrics = dict(state.opt_state), {}
        scale = state.latent_scale
        for part, objective in objectives.items():
            # keyed by part, so that its draws do not depend on which other parts train
            key = stream(jax.random.key(seed), part, state.step)
            # all parts read the state from before the step, so that their order does not matter
            run = partial(update, objective, state, frozen, tokens, key)
            if objective.always:
                params[part], opt_state[part], own = run()
            else:
                params[part], opt_state[part], own = jax.lax.cond(
                    objective.active(state.step), run, partial(_skip, run, state, part)
                )
            moments = own.pop(Z_MOMENTS, None)  # no scalar, so not logged
            if part == "rla" and running_latent_scale:
                done = (state.step - objective.start_step).astype(jnp.float32)
                after = latent_scale.followed(scale, own["z_std"] if moments is None else moments, done)
                scale = jnp.where(objective.active(state.step), after, scale)
            metrics |= {f"{part}/{name}": value for name, value in own.items()}
        metrics["latent_scale"] = latent_scale.size(scale)
        return TrainState(state.step + 1, params, opt_state, scale), metrics

    return step


def _skip(run: Callable, state: TrainState, part: str) -> tuple[Any, Any, Metrics]:
    """The result of `run` for an inactive objective: nothing changed, metrics zero."""
    metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run)[2])
    return state.params[part], state.opt_state[part], metrics | {"finite": jnp.ones(())}


def jit_train_step(
    step: TrainStep, state: TrainState, frozen: nnx.State, mesh: Mesh, batch_names: Sequence[str]
) -> jax.stages.Wrapped:
    """`step` under `jax.jit` with shardings on every input and output; the state is donated, frozen weights are not."""
    state_shardings = tree_shardings(state, mesh)
    batch = dict.fromkeys(batch_names, batch_sharding(mesh))
    return jax.jit(
        on_mesh(step, mesh),
        in_shardings=(state_shardings, tree_shardings(frozen, mesh), batch),
        out_shardings=(state_shardings, replicated(mesh)),
        # the new state takes the old one's memory; frozen weights are read again at the next step
        donate_argnums=0,
    )
