"""What computing one stage in bfloat16 costs: the error of predicted tokens at official width, stage by stage.

    python -m tests.tools.bfloat16_cost [--patches=8] [--windows=2]

Backbone, RLA encoder, condition stage, flow stage and RLA decoder each run in bfloat16 while the rest runs in float32.
Networks are as initialised, with zero-initialised layers drawn like the others (else nothing would be predicted), and
frames are noise: `patches` per side instead of 32, because no weight is specific to a patch. Errors are mean absolute
deviations of s^, whose rms is 1, from all of it in float32. Prints the table of rlawm_jax/convert/README.md.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs import base
from rlawm_jax import flow, markdown
from rlawm_jax.models.denoiser import Condition, Denoiser
from rlawm_jax.models.rla import RLA
from rlawm_jax.models.vit import DinoViT, variant

STAGES = ("backbone", "RLA encoder", "condition stage", "flow stage", "RLA decoder")
PUBLISHED = 0.030  # L1 of predicted tokens on ManiSkill, Table 1 of the paper
F32, BF16 = jnp.float32, jnp.bfloat16

Modules = dict[Any, nnx.Module]  # by dtype, with the same parameters


def in_both(make: Callable[..., nnx.Module], seed: int) -> Modules:
    """A network for float32 and for bfloat16 compute that shares its parameters; no kernel is zero."""

    def parameters(key: jax.Array) -> nnx.State:
        state = nnx.state(make(dtype=F32, rngs=nnx.Rngs(key)))
        flat = []
        for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
            value = leaf.get_value()
            if path[-1] == "kernel":
                drawn = value.shape[-2] ** -0.5 * jax.random.normal(jax.random.fold_in(key, i), value.shape)
                value = jnp.where(jnp.any(value), value, drawn)
            flat.append((path, leaf.replace(value)))
        return nnx.from_flat_state(flat)

    state = jax.jit(parameters)(jax.random.key(seed))
    skeletons = {t: nnx.eval_shape(lambda t=t: make(dtype=t, rngs=nnx.Rngs(0))) for t in (F32, BF16)}
    return {t: nnx.merge(nnx.graphdef(skeleton), state) for t, skeleton in skeletons.items()}


def networks(config: ConfigDict) -> tuple[Modules, Modules, Modules]:
    """Backbone, RLA autoencoder and denoiser of the official sizes."""
    spec = variant(config.backbone.name)
    common = {"token_width": spec.width, "remat": "none"}
    settings = {k: v for k, v in config.denoiser.items() if k not in ("action_dims", "time_schedule")}
    denoiser = partial(
        Denoiser,
        num_tokens=config.rla.num_tokens,
        token_dim=config.rla.token_dim,
        action_dims={0: 9},
        max_horizon=config.data.max_horizon,
        **settings,
        **common,
    )
    return in_both(partial(DinoViT, spec), 0), in_both(partial(RLA, **config.rla, **common), 1), in_both(denoiser, 2)


@partial(jax.jit, static_argnames=("graphdef", "method"))
def _call(graphdef: nnx.GraphDef, state: nnx.State, method: str, *args: Any) -> Any:
    return getattr(nnx.merge(graphdef, state), method)(*args)


def call(module: nnx.Module, method: str, *args: Any) -> Any:
    graphdef, state = nnx.split(module)
    return _call(graphdef, state, method, *args)


@partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample(graphdef: nnx.GraphDef, state: nnx.State, noise: jax.Array, condition: Condition, steps: int) -> jax.Array:
    module: Any = nnx.merge(graphdef, state)
    return flow.sample(lambda x, t: module.velocity(x, t, condition), noise, steps, "euler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=8, help="patches per side")
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    began, config = time.monotonic(), base.get_config()
    backbone, rla, denoiser = networks(config)
    rng, n, scale = np.random.default_rng(0), options.windows, config.latent_scale.value
    side = options.patches * variant(config.backbone.name).patch
    frames = rng.random((2, n, side, side, 3), np.float32)
    noise = rng.standard_normal((n, config.rla.num_tokens, config.rla.token_dim), np.float32)
    rows = config.data.max_horizon - 1
    actions = (rng.standard_normal((n, rows, 9), np.float32), np.full(n, rows), np.zeros(n, int))

    def dtype(stage: str, rough: tuple[str, ...]) -> Any:
        return BF16 if stage in rough else F32

    def tokens(rough: tuple[str, ...], frame: int) -> jax.Array:
        return call(backbone[dtype("backbone", rough)], "__call__", frames[frame]).astype(F32)

    def predicted(rough: tuple[str, ...]) -> jax.Array:
        """s^ from the first frame and actions."""
        s0, flow_dtype = tokens(rough, 0), dtype("flow stage", rough)
        condition = call(denoiser[dtype("condition stage", rough)], "condition", s0, *actions)
        condition = jax.tree.map(lambda x: x.astype(flow_dtype), condition)
        x0 = sample(*nnx.split(denoiser[flow_dtype]), noise, condition, config.sampler.steps)
        return call(rla[dtype("RLA decoder", rough)], "decode", s0, scale * x0)

    def reconstructed(rough: tuple[str, ...]) -> jax.Array:
        """s^ from both frames, through the encoder."""
        s0, s1 = tokens(rough, 0), tokens(rough, 1)
        z = scale * call(rla[dtype("RLA encoder", rough)], "encode", s0, s1)  # of the official latents' size
        return call(rla[dtype("RLA decoder", rough)], "decode", s0, z)

    paths = {"prediction": predicted, "reconstruction": reconstructed}
    exact = {name: path(()) for name, path in paths.items()}
    unused = {"prediction": ("RLA encoder",), "reconstruction": ("condition stage", "flow stage")}
    table = []
    for rough in (*((stage,) for stage in STAGES), STAGES):
        row = [rough[0] if len(rough) == 1 else "all"]
        for name, path in paths.items():
            if len(rough) == 1 and rough[0] in unused[name]:
                row.append("")
                continue
            error = float(jnp.abs(path(rough) - exact[name]).mean())
            row.append(f"{error:.4f} ({100 * error / PUBLISHED:.0f} %)")
        table.append(row)
        print(*row, sep=" | ", flush=True)
    rms = ", ".join(f"{name} {float(jnp.sqrt(jnp.square(value).mean())):.2f}" for name, value in exact.items())
    print(markdown.table(("in bfloat16", *paths), table))
    print(f"rms of s^: {rms}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
