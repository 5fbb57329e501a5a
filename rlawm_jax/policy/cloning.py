"""Behaviour cloning, optionally with action-free video (METHOD.md 8): loss, step, and what the loop needs.

The loop, the optimizer and the checkpoints are shared with the world model. Averaged weights are part of the training
state; they are the weights that are validated, and that a checkpoint provides for acting.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from data.cloning import PolicyData, PolicyIterator, choose_roles
from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate
from rlawm_jax.models.policy import Policy
from rlawm_jax.objectives import l1_mse
from rlawm_jax.policy.checkpoint import policy_meta
from rlawm_jax.policy.frames import FrameReader, identity_of, observed_by, open_datasets, read_episodes
from rlawm_jax.policy.observation import load_observation_model
from rlawm_jax.rng import stream
from rlawm_jax.sharding import batch_share, check_batch_size, make_mesh, place, tree_shardings
from rlawm_jax.training.optimizer import make_optimizer
from rlawm_jax.training.run import Run
from rlawm_jax.training.step import Metrics, TrainStep

PART = "policy"
LIMITS = ("action_scale", "action_offset", "state_scale", "state_offset")


class PolicyState(NamedTuple):
    """Step counter, parameters and optimizer state of the policy, and its exponentially averaged parameters."""

    step: Int[Array, ""]
    params: dict[str, nnx.State]
    opt_state: dict[str, Any]
    ema: nnx.State


@dataclasses.dataclass
class PolicyRun(Run):
    """A prepared policy training run, whose checkpoints hold the policy that acts."""

    graphdef: nnx.GraphDef
    data: PolicyData

    words = Run.words._replace(backbone="config.world_model")

    def saved_frozen(self) -> nnx.State:
        """The policy that acts: averaged parameters and normaliser limits."""
        return nnx.merge_state(self.frozen, self.state.ema)  # the latter takes precedence

    def policy(self) -> Policy:
        """The policy that acts, as a module."""
        return nnx.merge(self.graphdef, self.saved_frozen())


def prepare_policy(config: ConfigDict, workdir: Path) -> PolicyRun:
    """Choose episodes, read their frames, and build policy and training step; nothing is written to `workdir`.

    Errors name the key or file at fault.
    """
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.data.batch_size, mesh)
    _check_ema(config.ema)
    if config.data.every < 1 or config.data.shift < 0:
        raise ValueError(
            f"config.data.every, shift: expected at least 1 and 0, found {config.data.every} and {config.data.shift}"
        )
    transform = make_optimizer(config.optimizer, 0, config.train.steps)
    nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0)))  # bad sizes are rejected before anything is read
    observer = load_observation_model(config, needs=("rla",) if config.policy.rla.enabled else ())
    if observer is not None and config.policy.rla.enabled:
        _check_latent(config, observer.config)
    datasets = open_datasets(config, observer)
    roles = choose_roles(config.data, datasets.stores, with_video=config.policy.rla.enabled)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.observed = observed_by(config, datasets, observer)
        config.world_model = str(Path(config.world_model).absolute()) if observer else ""
    arrays = read_episodes(config, roles, FrameReader(config, datasets, observer))
    data = PolicyData(arrays, roles, horizon=config.policy.horizon, pad_after=config.data.pad_after)
    del observer  # frees its weights before the policy's are allocated

    policy = _init_policy(config, mesh)
    labelled = data.rows_of_labelled()
    policy.set_limits(arrays.actions[labelled], None if arrays.states is None else arrays.states[labelled])
    graphdef, params, frozen = nnx.split(policy, nnx.Param, ...)
    frozen = place(frozen, mesh)  # limits were measured on the host
    init = partial(_init_state, transform=transform)
    state = jax.jit(init, out_shardings=tree_shardings(jax.eval_shape(init, params), mesh))(params)
    identity, shards = identity_of(config, roles, datasets), mesh.shape["data"] * mesh.shape["fsdp"]
    iterator = PolicyIterator(data, config.data, identity, shards=shards, share=batch_share(mesh))
    step_fn = make_policy_step(graphdef, transform, config)
    return PolicyRun(config, mesh, iterator, state, frozen, step_fn, policy_meta(config), graphdef, data)


def _init_policy(config: ConfigDict, mesh: Mesh) -> Policy:
    def build() -> Policy:
        return Policy(config, rngs=nnx.Rngs(stream(jax.random.key(config.seed), "parameters")))

    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    state = jax.jit(lambda: nnx.state(build()), out_shardings=tree_shardings(abstract, mesh))()
    return nnx.merge(graphdef, state)


def _init_state(params: nnx.State, transform: optax.GradientTransformation) -> PolicyState:
    ema = jax.tree.map(jnp.copy, params)  # the step donates both, so they must not share a buffer
    return PolicyState(jnp.zeros((), jnp.int32), {PART: params}, {PART: transform.init(params)}, ema)


def policy_loss(policy: Policy, batch: dict[str, Array], weights: ConfigDict, key: Array | None):
    """Action MSE over samples with actions, plus the latent head's L1 and MSE over all; `key` enables dropout.

    Actions are compared normalised, latents in flow space. `latent_over_constant` is the latent's MSE as a share of the
    best constant's on the same batch: at 1 the head knows nothing of the frame.
    """
    features = policy.features(batch["images"] / 255.0, batch.get("states"), batch.get("has_actions"))
    metrics, latent_loss = {}, jnp.zeros(())
    if policy.latent_head is not None:
        actions, latent = policy.actions_and_latent(features, key)
        metrics["latent_l1"], metrics["latent_mse"] = l1_mse(latent, batch["latents"])
        constant = l1_mse(batch["latents"].mean(axis=0), batch["latents"])[1]
        metrics["latent_over_constant"] = metrics["latent_mse"] / jnp.maximum(constant, 1e-12)
        latent_loss = weights.rla_l1 * metrics["latent_l1"] + weights.rla_mse * metrics["latent_mse"]
    else:
        actions = policy.base_actions(features, key)
    errors = jnp.square(actions - policy.normalise(batch["actions"])).mean(axis=(1, 2))
    known = batch["has_actions"].astype(jnp.float32) if "has_actions" in batch else jnp.ones_like(errors)
    metrics["action_mse"] = (errors * known).sum() / jnp.maximum(known.sum(), 1.0)
    return metrics["action_mse"] + latent_loss, metrics


def ema_decay(step: Int[Array, ""], power: float, maximum: float) -> Float[Array, ""]:
    """The average's decay at update number `step` (from 0): 1 - (1 + step - 1)^-power, 0 at first.

    METHOD.md 13.11.
    """
    age = jnp.maximum(step - 1, 0).astype(jnp.float32)
    return jnp.where(age > 0, jnp.minimum(1.0 - (1.0 + age) ** -power, maximum), 0.0)


def make_policy_step(graphdef: nnx.GraphDef, transform: optax.GradientTransformation, config: ConfigDict) -> TrainStep:
    """The training step as a pure function (state, frozen, batch) -> (state, metrics); jit it with `jit_train_step`.

    Held-out chunks in the batch give `validation/loss`, the action MSE of the averaged weights.
    """

    def step(state: PolicyState, frozen: nnx.State, batch: dict[str, Array]) -> tuple[PolicyState, Metrics]:
        # after resuming, `frozen` holds all of the checkpoint's `frozen`, averaged parameters included
        limits = nnx.State({name: frozen[name] for name in LIMITS})
        key = stream(jax.random.key(config.seed), "policy", state.step)
        held_out = {name.removeprefix("validation_"): batch[name] for name in batch if name.startswith("validation_")}
        training = {name: value for name, value in batch.items() if not name.startswith("validation_")}
        if config.data.shift:
            training["images"] = shifted(training["images"], stream(key, "shift"), config.data.shift)

        def loss_of(params: nnx.State) -> tuple[Array, Metrics]:
            return policy_loss(nnx.merge(graphdef, params, limits), training, config.loss, key)

        params = state.params[PART]
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = transform.update(grads, state.opt_state[PART], params)
        params: Any = optax.apply_updates(params, updates)
        decay = ema_decay(state.step, config.ema.power, config.ema.max)
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
        norm = optax.global_norm(grads)
        metrics |= {"loss": loss, "grad_norm": norm, "finite": jnp.isfinite(loss) & jnp.isfinite(norm)}
        metrics = {f"{PART}/{name}": value.astype(jnp.float32) for name, value in metrics.items()}
        if held_out:
            _, held_out_metrics = policy_loss(nnx.merge(graphdef, ema, limits), held_out, config.loss, None)
            metrics["validation/loss"] = held_out_metrics["action_mse"]
        return PolicyState(state.step + 1, {PART: params}, {PART: opt_state}, ema), metrics

    return step


def shifted(images: Array, key: Array, most: int) -> Array:
    """Each image shifted by up to `most` pixels along both axes, with its border repeated."""
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * most + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


class Validation(NamedTuple):
    """Action MSE (normalised) over all held-out chunks, of the policy and of two baselines that need no policy."""

    policy: Estimate
    mean_chunk: Estimate
    last_action: Estimate


def validate(run: PolicyRun) -> Validation | None:
    """Score the averaged policy on every held-out chunk; None where no episode is held out.

    `mean_chunk` is the mean of the labelled training chunks; `last_action` repeats the action before the chunk or, at
    an episode's start, the chunk's first action, which favours this baseline. Intervals are over episodes.
    """
    chunks, arrays = run.data.validation, run.data.arrays
    if not len(chunks):
        return None
    graphdef, size = run.graphdef, min(64, len(chunks))

    @jax.jit
    def answer(state: nnx.State, images: Array, states: Array | None) -> tuple[Array, Array]:
        policy = nnx.merge(graphdef, state)
        return policy.base_actions(policy.features(images / 255.0, states)), policy.action_scale[...]

    weights, answers, scale = run.saved_frozen(), [], None
    for begin in range(0, len(chunks), size):
        which = np.minimum(np.arange(begin, begin + size), len(chunks) - 1)
        batch = run.data.load(chunks, which)
        actions, scale = answer(weights, batch["images"], batch.get("states"))
        answers.append(np.asarray(actions))
    offset = np.asarray(run.policy().action_offset[...])
    normalised = arrays.actions * np.asarray(scale) + offset
    target = normalised[chunks.rows]
    before = np.maximum(chunks.first - 1, arrays.offsets[chunks.episode])
    bootstrap = ClusterBootstrap(chunks.episode, seed=run.config.seed)

    def score(guess: np.ndarray) -> Estimate:
        error = bootstrap.mean(np.square(guess - target).mean(axis=(1, 2)))
        assert error is not None
        return error

    return Validation(
        policy=score(np.concatenate(answers)[: len(chunks)]),
        mean_chunk=score(normalised[run.data.labelled.rows].mean(axis=0)),
        last_action=score(normalised[before][:, None]),
    )


def _check_latent(config: ConfigDict, world: ConfigDict) -> None:
    expected = world.rla.num_tokens * world.rla.token_dim
    if config.policy.rla.latent_dim != expected:
        raise ValueError(
            f"config.policy.rla.latent_dim: expected {expected}, the latent of {config.world_model} "
            f"({world.rla.num_tokens} x {world.rla.token_dim}), found {config.policy.rla.latent_dim}"
        )


def _check_ema(ema: ConfigDict) -> None:
    if ema.power <= 0 or not 0 <= ema.max < 1:
        raise ValueError(f"config.ema: expected power > 0 and max in [0, 1), found {ema.power} and {ema.max}")
