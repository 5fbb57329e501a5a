"""Into flow space and back: one divisor as released, or a mean and deviation per dimension that follow the latents."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax import latent_scale
from tests.tiny_models import LATENT, PER_DIMENSION, tiny_config, tiny_world, tokens

MEAN = np.linspace(-3, 3, LATENT[0] * LATENT[1]).reshape(LATENT)
DEVIATION = np.linspace(0.5, 2, LATENT[0] * LATENT[1]).reshape(LATENT)


def latents(batch: int, seed: int = 0) -> jnp.ndarray:
    noise = np.random.default_rng(seed).normal(size=(batch, *LATENT))
    return jnp.asarray(MEAN + DEVIATION * noise, jnp.float32)


def follow(batches, scale=None):
    scale = latent_scale.initial_scale(tiny_config(**PER_DIMENSION)) if scale is None else scale
    for done, z in enumerate(batches):
        scale = latent_scale.followed(scale, latent_scale.moments(z), jnp.float32(done))
    return scale


def test_means_and_deviations_are_those_of_all_latents_seen_so_far():
    batches = [latents(16, seed) for seed in range(20)]
    scale, seen = follow(batches), np.concatenate(batches)
    np.testing.assert_allclose(scale[0], seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scale[1], seen.std(0), rtol=1e-4)
    # 320 draws: five standard errors
    np.testing.assert_allclose(scale[0], MEAN, atol=5 * DEVIATION.max() / 320**0.5)
    x0 = latent_scale.to_flow(jnp.asarray(seen), scale)
    np.testing.assert_allclose(x0.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x0.std(0), 1, rtol=1e-4)


def test_later_batches_outweigh_earlier_ones():
    scale = follow([latents(16)])
    z = latents(16, seed=1) + 5
    late = latent_scale.followed(scale, latent_scale.moments(z), jnp.float32(5000))
    mean = latent_scale.DECAY * scale[0] + (1 - latent_scale.DECAY) * z.mean(0)
    square = latent_scale.DECAY * (scale[1] ** 2 + scale[0] ** 2) + (1 - latent_scale.DECAY) * (z**2).mean(0)
    np.testing.assert_allclose(late[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(late[1], jnp.sqrt(square - mean**2), rtol=1e-4)


def test_a_number_that_never_moves_has_no_deviation_of_zero():
    z = latents(64).at[:, 0, 0].set(0.3)
    scale = follow([z] * 3)
    assert np.isfinite(latent_scale.to_flow(z, scale)).all()
    np.testing.assert_allclose(scale[1, 0, 0], latent_scale.SMALLEST * latent_scale.size(scale), rtol=0.05)


def test_moments_of_micro_batches_average_to_those_of_the_batch():
    z = latents(16)
    halves = (latent_scale.moments(z[::2]) + latent_scale.moments(z[1::2])) / 2
    np.testing.assert_allclose(halves, latent_scale.moments(z), rtol=1e-6)


def test_into_flow_space_and_back_is_where_it_started():
    z, scale = latents(8), jnp.asarray(np.stack([MEAN, DEVIATION]), jnp.float32)
    np.testing.assert_allclose(latent_scale.from_flow(latent_scale.to_flow(z, scale), scale), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(latent_scale.to_flow(z, scale), (z - MEAN) / DEVIATION, rtol=1e-5, atol=1e-6)


def test_a_world_model_reconstructs_alike_whichever_way_its_latents_are_scaled():
    s0, s1 = jnp.asarray(tokens(2)), jnp.asarray(tokens(2, seed=1))
    model, through = tiny_world(**PER_DIMENSION), []
    for scale in (np.float32(10.0), np.stack([MEAN, DEVIATION]).astype(np.float32)):
        model.latent_scale.set_value(jnp.asarray(scale))
        x0 = model.latent(s0, s1)
        np.testing.assert_allclose(model.raw_latent(x0), model.rla.encode(s0, s1), rtol=1e-4, atol=1e-5)
        through.append(model.apply_latent(s0, x0))
    np.testing.assert_allclose(through[1], through[0], rtol=1e-4, atol=1e-5)


def test_the_official_latents_are_divided_by_ten_and_by_nothing_else():
    model, s0, s1 = tiny_world(), jnp.asarray(tokens(2)), jnp.asarray(tokens(2, seed=1))
    z = model.rla.encode(s0, s1)
    np.testing.assert_array_equal(model.latent(s0, s1), z / 10.0)
    np.testing.assert_array_equal(model.raw_latent(z), 10.0 * z)


@pytest.mark.parametrize("missing", ["latent_scale.running", "denoiser.token_embedding"])
def test_a_mean_per_dimension_needs_training_and_tokens_that_are_told_apart(missing):
    with pytest.raises(
        ValueError, match=rf"^config\.{missing}: expected True with .*per_dimension, found False"
    ) as error:
        latent_scale.initial_scale(tiny_config(**PER_DIMENSION | {missing.replace(".", "__"): False}))
    assert "\n" not in str(error.value)
