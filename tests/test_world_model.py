"""The world model: its three verbs, what they refuse, its parameter counts at the official size, and its ablations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from rlawm_jax.flow import MEAN, Sampler
from rlawm_jax.models.vit import DinoViT, variant
from rlawm_jax.training.state import count_parameters
from rlawm_jax.world_model import WorldModel
from tests.tiny_models import IMAGE_SIZE, LATENT, paths_with_gradient, run, tiny_config, tiny_world, tokens

B = 3
S0, S1 = tokens(B), tokens(B, seed=1)
ACTIONS = np.random.default_rng(2).normal(size=(B, 5, 3)).astype(np.float32)
COUNTS, ROBOTS = np.asarray([1, 5, 3]), np.asarray([0, 2, -1])
SAMPLER = Sampler("euler", 4)
FRAMES = np.random.default_rng(3).integers(0, 256, (B, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return tiny_world(backbone=True)


@jax.jit
def _noise(key, ids):
    return tiny_world().noise(key, ids)


def noise(ids, seed: int = 0):
    return _noise(jax.random.key(seed), jnp.asarray(ids))


def predict(world: WorldModel, noise, rows=slice(None), actions=ACTIONS, sampler=SAMPLER):
    graphdef, state = nnx.split(world)
    return _predict(graphdef, sampler, state, S0[rows], actions[rows], COUNTS[rows], ROBOTS[rows], noise)


def _predict_(graphdef, sampler, state, *args):
    return nnx.merge(graphdef, state).predict(*args, sampler)


_predict = jax.jit(_predict_, static_argnums=(0, 1))


def test_encode_gives_the_backbones_tokens_of_frames_between_zero_and_one(world):
    encoded = run(world, FRAMES, method="encode")
    assert encoded.shape == (B, 4, 384)
    assert encoded.dtype == jnp.float32
    expected = run(world.backbone, (FRAMES / 255.0).astype(np.float32))
    np.testing.assert_allclose(encoded, expected, rtol=0, atol=1e-5)


def test_no_gradient_reaches_the_backbone(world):
    graphdef, params, rest = nnx.split(world, nnx.Param, ...)

    def scalar(params):
        return jnp.square(nnx.merge(graphdef, params, rest).encode(jnp.asarray(FRAMES))).sum()

    assert paths_with_gradient(jax.jit(jax.grad(scalar))(params)) == set()


def test_encode_without_a_backbone_is_refused_in_one_line():
    with pytest.raises(ValueError, match="was built without its backbone and cannot encode frames"):
        tiny_world().encode(jnp.asarray(FRAMES))


def test_latents_are_divided_by_the_scale_on_the_way_in_and_multiplied_on_the_way_out(world):
    z, x0 = run(world.rla, S0, S1, method="encode"), run(world, S0, S1, method="latent")
    np.testing.assert_allclose(x0, z / 10.0, rtol=1e-5, atol=1e-6)
    expected = run(world.rla, S0, z, method="decode")
    np.testing.assert_allclose(run(world, S0, x0, method="apply_latent"), expected, rtol=0, atol=1e-4)


def test_noise_is_standard_normal_and_follows_ids_not_places_in_the_batch():
    ids = np.arange(2000)
    draws = np.asarray(noise(ids))
    assert draws.shape == (2000, *LATENT)
    # 24,000 draws: four standard errors
    assert abs(draws.mean()) < 4 / math.sqrt(draws.size)
    assert abs(draws.std() - 1) < 4 / math.sqrt(2 * draws.size)
    order = np.random.default_rng(0).permutation(ids)
    np.testing.assert_array_equal(noise(order), draws[order])
    assert not np.any(noise(ids, seed=1) == draws)


def test_predict_is_a_function_of_its_noise_and_of_each_sample_alone(world):
    start = noise([4, 9, 2])
    after, x0 = predict(world, start)
    again, _ = predict(world, start)
    np.testing.assert_array_equal(after, again)
    other, _ = predict(world, noise([4, 9, 3]))
    assert np.any(np.abs(other - after) > 1e-3, axis=(1, 2)).tolist() == [False, False, True]
    order = [2, 0, 1]
    moved, moved_x0 = predict(world, start[jnp.asarray(order)], order)
    # the same sums in another place of the batch
    np.testing.assert_allclose(moved, after[jnp.asarray(order)], rtol=0, atol=1e-4)
    np.testing.assert_allclose(moved_x0, x0[jnp.asarray(order)], rtol=0, atol=1e-4)


def test_predict_integrates_the_denoisers_velocity_and_decodes_ten_times_the_latent(world):
    start = noise([4, 9, 2])
    after, x0 = predict(world, start)
    condition = run(world.denoiser, S0, ACTIONS, COUNTS, ROBOTS, method="condition")
    x = start
    for i in range(4):
        x = x - run(world.denoiser, x, jnp.full(B, 1 - i / 4), condition, method="velocity") / 4
    np.testing.assert_allclose(x0, x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after, run(world.rla, S0, 10.0 * x, method="decode"), rtol=0, atol=1e-4)


def test_the_mean_prediction_does_not_depend_on_the_noise_and_half_of_it_is_half_the_temperature(world):
    some, other = noise([4, 9, 2]), noise([5, 6, 7])
    np.testing.assert_array_equal(predict(world, some, sampler=MEAN)[1], predict(world, other, sampler=MEAN)[1])
    cooler = Sampler(SAMPLER.solver, SAMPLER.steps, temperature=0.5)
    np.testing.assert_array_equal(predict(world, some, sampler=cooler)[1], predict(world, some / 2)[1])


def test_action_statistics_of_the_model_turn_raw_rows_into_what_the_encoders_read(world):
    start, scale, offset = noise([4, 9, 2]), np.asarray([0.1, 2.0, 0.5]), np.asarray([1.0, -1.0, 0.2])
    plain, _ = predict(world, start)
    measured = nnx.clone(world)
    for encoder in measured.denoiser.action_encoders.values():
        encoder.scale[...] = jnp.asarray(scale[: encoder.action_dim], jnp.float32)
        encoder.offset[...] = jnp.asarray(offset[: encoder.action_dim], jnp.float32)
    raw = ((ACTIONS - offset) / scale).astype(np.float32)
    np.testing.assert_allclose(predict(measured, start, actions=raw)[0], plain, rtol=0, atol=1e-4)
    assert np.abs(predict(measured, start)[0] - plain).max() > 1e-3


def test_decode_gives_frames_of_the_input_size_within_zero_and_one(world):
    loud = nnx.clone(world)
    loud.image_decoder.conv_out.kernel[...] = 100 * loud.image_decoder.conv_out.kernel[...]
    frame = np.asarray(run(loud, S0, method="decode"))
    assert frame.shape == (B, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert frame.min() == 0
    assert frame.max() == 1


def test_an_image_size_that_is_not_a_multiple_of_the_patch_gives_frames_of_that_size():
    odd = IMAGE_SIZE - 5
    model = tiny_world(backbone__image_size=odd)
    assert model.grid == (2, 2)
    assert run(model, S0, method="decode").shape == (B, odd, odd, 3)


# what the official size should hold, from the layers' formulas (C tokens, W width, D latent, A action, M image decoder)
C = W = M = 1024
D, K = 64, 32


def linear(i: int, o: int) -> int:
    return i * o + o


ATTENTION, MLP, NORM = 4 * linear(W, W), linear(W, 4 * W) + linear(4 * W, W), 2 * W
BLOCK = ATTENTION + MLP
MODULATION = linear(W, 6 * W)


def token_transformer(out: int) -> int:
    return K * W + linear(C, W) + 12 * BLOCK + NORM + linear(W, out)


def gru(i: int, h: int) -> int:
    return i * 3 * h + h * 3 * h + 2 * 3 * h


def residual_block(c: int) -> int:
    return 2 * (9 * c * c + c + 2 * c)


def image_decoder() -> int:
    ups = sum(4 * w * w // 2 + w // 2 + 2 * residual_block(w // 2) for w in (M, M // 2, M // 4, M // 8))
    last = M // 16
    return 9 * C * M + M + 2 * M + 2 * residual_block(M) + ups + residual_block(last) + 27 * last + 3


def vit() -> int:
    """DINOv3 ViT-L/16: 24 blocks with affine norms, LayerScale and no key bias; CLS and 4 registers, no positions."""
    return linear(3 * 16 * 16, W) + 5 * W + 24 * (BLOCK - W + 2 * NORM + 2 * W) + NORM


OFFICIAL_COUNTS = {
    "rla.encoder": (token_transformer(D), 152_255_552),
    "rla.decoder": (token_transformer(C) + linear(D, W), 153_306_112),
    "denoiser.action_encoders": (linear(9, 64) + linear(64, 64) + gru(64, W), 3_353_280),
    "denoiser.cond_blocks": (8 * (BLOCK + linear(W, W) + MODULATION), 159_514_624),
    "denoiser.flow_blocks": (8 * (2 * ATTENTION + NORM + MLP + MODULATION), 184_721_408),
    "denoiser.time_embedding": (linear(256, W) + linear(W, W), 1_312_768),
    "denoiser": (None, 349_036_288),
    "image_decoder": (image_decoder(), 62_608_643),
    "backbone": (vit(), 303_128_576),
}


@pytest.fixture(scope="module")
def official() -> WorldModel:
    config = base.get_config()

    def make() -> WorldModel:
        rngs = nnx.Rngs(0)
        return WorldModel(config, backbone=DinoViT(variant(config.backbone.name), rngs=rngs), rngs=rngs)

    return nnx.eval_shape(make)


def abstract_call(model: WorldModel, method: str, *args):
    """Output shapes of model.method on arrays of the given (shape, dtype)s; nothing is computed."""
    graphdef, state = nnx.split(model)
    shapes = [jax.ShapeDtypeStruct(*arg) for arg in args]
    return jax.eval_shape(lambda state, *args: getattr(nnx.merge(graphdef, state), method)(*args), state, *shapes)


def test_official_size_has_the_parameter_counts_of_its_formulas(official):
    for name, (formula, literal) in OFFICIAL_COUNTS.items():
        module = official
        for step in name.split("."):
            module = getattr(module, step)
        count = count_parameters(nnx.state(module, nnx.Param))
        assert (name, count) == (name, literal)
        assert formula in (None, literal), name
    everything = count_parameters(nnx.state(official, nnx.Param))
    parts = ("rla.encoder", "rla.decoder", "denoiser", "image_decoder", "backbone")
    # the whole is its parts: nothing trained hides elsewhere
    assert everything == sum(OFFICIAL_COUNTS[part][1] for part in parts)


def test_official_size_maps_512_pixels_to_1024_tokens_and_back(official):
    frames, rows = ((2, 512, 512, 3), jnp.uint8), ((2, 15, 9), jnp.float32)
    state, latent, ints = ((2, 1024, 1024), jnp.float32), ((2, 32, 64), jnp.float32), ((2,), jnp.int32)
    assert abstract_call(official, "encode", frames).shape == (2, 1024, 1024)
    assert abstract_call(official, "latent", state, state).shape == (2, 32, 64)
    assert abstract_call(official, "apply_latent", state, latent).shape == (2, 1024, 1024)
    condition = abstract_call(official.denoiser, "condition", state, rows, ints, ints)
    assert [leaf.shape for leaf in condition.keys_values] == [(8, 2, 1024, 16, 64)] * 2
    assert abstract_call(official, "decode", state).shape == (2, 512, 512, 3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rla.num_tokens": 8, "rla.token_dim": 8},
        {"rla.input_mode": "concat"},
        {"rla.input_mode": "append"},
        {"rla.decoder_only": True},
        {"rla.variational": True},
        {"denoiser.cond_depth": 12, "denoiser.flow_depth": 12, "denoiser.action_dims": {"0": 14}},
    ],
    ids=["8x8", "concat", "append", "decoder_only", "variational", "iws"],
)
def test_ablations_of_the_official_size_are_config_overrides(overrides):
    config = base.get_config()
    for name, value in overrides.items():
        section, field = name.split(".")
        config[section][field] = value
    model = nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
    state, latent = ((2, 1024, 1024), jnp.float32), (2, config.rla.num_tokens, config.rla.token_dim)
    assert abstract_call(model, "latent", state, state).shape == latent
    assert abstract_call(model, "apply_latent", state, (latent, jnp.float32)).shape == (2, 1024, 1024)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ({"dtype": "float16"}, "config.dtype: expected one of float32, bfloat16, found 'float16'"),
        ({"latent_scale__value": 0.0}, "config.latent_scale.value: expected a positive number, found 0.0"),
        ({"backbone__name": "resnet50"}, "backbone 'resnet50' is unknown; choose one of "),
    ],
)
def test_settings_out_of_range_are_refused_by_the_name_of_their_key(override, line):
    with pytest.raises(ValueError) as error:
        nnx.eval_shape(lambda: WorldModel(tiny_config(**override), backbone=None, rngs=nnx.Rngs(0)))
    assert str(error.value).startswith(line)
