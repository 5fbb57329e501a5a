"""The training state: what is optimised and what is only read, taken apart and put together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rlawm_jax.training.state import count_parameters, init_state, join_model, split_model
from rlawm_jax.world_model import PARTS
from tests.tiny_models import LATENT, tiny_world


def test_splitting_and_joining_a_model_gives_it_back():
    model = tiny_world()
    graphdef, params, frozen = split_model(model, ["rla"])
    assert set(params) == {"rla"}
    joined = join_model(graphdef, params, frozen, model.latent_scale[...])
    for before, after in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, joined)), strict=True):
        np.testing.assert_array_equal(before, after)
    assert joined.noise(jax.random.key(0), jnp.arange(2)).shape == (2, *LATENT)


def test_statistics_and_the_latent_scale_are_never_trained():
    _, params, frozen = split_model(tiny_world(backbone=True), list(PARTS))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(frozen)}
    assert {path for path in paths if not path.startswith("backbone/")} == {
        f"denoiser/action_encoders/{robot}/{name}" for robot in ("0", "2") for name in ("scale", "offset")
    }
    assert all(isinstance(leaf, nnx.Param) for part in params.values() for _, leaf in nnx.to_flat_state(part))
    assert any(path.startswith("backbone/") for path in paths)


def test_the_optimizer_knows_the_trained_parts_alone():
    _, params, frozen = split_model(tiny_world(backbone=True), ["rla", "denoiser"])
    state = init_state(params, dict.fromkeys(PARTS, optax.adam(1.0)), jnp.asarray(10.0))
    assert set(state.opt_state) == set(state.params) == {"rla", "denoiser"}
    moments = count_parameters(state.opt_state)
    assert moments == 2 * count_parameters(params) + 2  # two moments each, and two counters
    assert state.step == 0
    assert {"backbone", "image_decoder"} <= set(frozen)
