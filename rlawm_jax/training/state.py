"""The state a training run carries from step to step. Data only."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from rlawm_jax.latent_scale import Scale
from rlawm_jax.models.layers import Statistic
from rlawm_jax.sharding import place, tree_shardings
from rlawm_jax.world_model import WorldModel


class TrainState(NamedTuple):
    """Step counter, trained parameters and optimizer state by part, and the running latent scale."""

    step: Int[Array, ""]
    params: dict[str, nnx.State]
    opt_state: dict[str, Any]
    latent_scale: Scale


def split_model(model: WorldModel, parts: Sequence[str]) -> tuple[nnx.GraphDef, dict[str, nnx.State], nnx.State]:
    """(graphdef, parameters of each trained part, everything else): what is optimised and what is only read.

    The latent scale belongs to neither: it is part of the training state.
    """

    def belongs_to(part: str):
        return lambda path, value: path[0] == part and isinstance(value, nnx.Param)

    # the latent scale is in neither: it may change at every step, but not by a gradient
    filters = [belongs_to(part) for part in parts]
    graphdef, *states, _, frozen = nnx.split(model, *filters, lambda path, _: path[0] == "latent_scale", ...)
    return graphdef, dict(zip(parts, states, strict=True)), frozen


def join_model(
    graphdef: nnx.GraphDef, params: Mapping[str, nnx.State], frozen: nnx.State, latent_scale: Array
) -> WorldModel:
    """The reassembled world model; the inverse of `split_model`, with the current latent scale."""
    scale = nnx.State({"latent_scale": Statistic(latent_scale)})
    return nnx.merge(graphdef, *params.values(), scale, frozen)


def init_state(
    params: dict[str, nnx.State], transforms: Mapping[str, optax.GradientTransformation], latent_scale: Array
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={part: transforms[part].init(params[part]) for part in params},
        latent_scale=latent_scale,
    )


def place_state(
    params: dict[str, nnx.State], transforms: Mapping[str, optax.GradientTransformation], scale: Array, mesh: Mesh
) -> TrainState:
    """The state before the first step on `mesh`, every array created in its final sharding."""
    init = partial(init_state, transforms=transforms)
    scale = place(scale, mesh)
    shardings = tree_shardings(jax.eval_shape(init, params, latent_scale=scale), mesh)
    return jax.jit(init, out_shardings=shardings)(params, latent_scale=scale)


def count_parameters(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
