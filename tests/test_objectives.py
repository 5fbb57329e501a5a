"""The training losses: their values by hand, and whose parameters each may move."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax import flow, image_metrics
from rlawm_jax.models.layers import Statistic
from rlawm_jax.objectives import Objective, TokenBatch, denoiser_loss, image_decoder_loss, rla_loss
from rlawm_jax.rng import stream
from rlawm_jax.world_model import WorldModel
from tests.tiny_models import IMAGE_SIZE, paths_with_gradient, run, tiny_world, tokens

B, KEY = 3, jax.random.key(0)
rng = np.random.default_rng(0)
BATCH = TokenBatch(
    s0=jnp.asarray(tokens(B)),
    s1=jnp.asarray(tokens(B, seed=1)),
    actions=jnp.asarray(rng.normal(size=(B, 5, 3)), jnp.float32),
    num_actions=jnp.asarray([1, 5, 3]),
    robot_id=jnp.asarray([0, 2, 0]),
    images=jnp.asarray(rng.random((B, 2, IMAGE_SIZE, IMAGE_SIZE, 3)), jnp.float32),
)
PAIRS = jnp.stack([BATCH.s0, BATCH.s1], axis=1).reshape(2 * B, *BATCH.s0.shape[1:])
LOSSES = {
    "rla": partial(rla_loss, l1=0.5, mse=2.0, kl=0.0),
    "denoiser": partial(denoiser_loss, l1=0.5, mse=2.0, time_schedule="logit_normal", repeats=3),
    "image_decoder": partial(image_decoder_loss, l1=0.5, ssim=2.0, lpips=0.3, max_images=100),
}
CLOSE = {"rel": 1e-5}


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return tiny_world(backbone=True)


def evaluate(loss, world: WorldModel, batch: TokenBatch = BATCH, key=KEY):
    graphdef, state = nnx.split(world)
    return jax.jit(lambda state, batch: loss(nnx.merge(graphdef, state), batch, key))(state, batch)


def errors(prediction, target) -> tuple[float, float]:
    difference = np.asarray(prediction, np.float64) - np.asarray(target, np.float64)
    return np.abs(difference).mean(), np.square(difference).mean()


@pytest.mark.parametrize("part", LOSSES)
def test_each_loss_moves_every_leaf_of_its_own_part_and_no_other(world, part):
    graphdef, params, rest = nnx.split(world, nnx.Param, ...)

    def scalar(params):
        return LOSSES[part](nnx.merge(graphdef, params, rest), BATCH, KEY)[0]

    moved = paths_with_gradient(jax.jit(jax.grad(scalar))(params))
    every = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    # zero up to rounding: a key's bias shifts all scores of a query alike, so softmax does not see it, nor does a
    # GroupNorm of one channel per group see the bias of the convolution before it
    unseen = ("key.bias", "conv1.bias", "conv2.bias")
    own = {name for name in every if name.startswith(f"{part}.") and not name.endswith(unseen)}
    assert {name for name in moved if not name.endswith(unseen)} == own
    assert {name.split(".")[0] for name in moved} == {part}


def test_rla_loss_weighs_l1_and_mse_of_the_reconstruction(world):
    loss, metrics = evaluate(LOSSES["rla"], world)
    z = run(world.rla, BATCH.s0, BATCH.s1, method="encode")
    l1, mse = errors(run(world.rla, BATCH.s0, z, method="decode"), BATCH.s1)
    assert float(metrics["l1"]) == pytest.approx(l1, **CLOSE)
    assert float(metrics["mse"]) == pytest.approx(mse, **CLOSE)
    assert float(loss) == pytest.approx(0.5 * l1 + 2.0 * mse, **CLOSE)
    assert float(metrics["copy_l1"]) == pytest.approx(errors(BATCH.s0, BATCH.s1)[0], **CLOSE)
    assert float(metrics["z_std"]) == pytest.approx(float(z.std()), **CLOSE)
    assert float(metrics["kl"]) == 0


def test_variational_rla_loss_samples_its_latent_and_adds_the_divergence_from_a_standard_normal():
    world = tiny_world(rla__variational=True)
    loss, metrics = evaluate(partial(rla_loss, l1=1.0, mse=1.0, kl=0.1), world)
    mean, log_var = (np.asarray(a, np.float64) for a in run(world.rla, BATCH.s0, BATCH.s1, method="posterior"))
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).mean()
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(loss) == pytest.approx(float(metrics["l1"] + metrics["mse"]) + 0.1 * kl, **CLOSE)
    z = mean + np.exp(log_var / 2) * jax.random.normal(stream(KEY, "vae"), mean.shape)
    l1, _ = errors(run(world.rla, BATCH.s0, z.astype(np.float32), method="decode"), BATCH.s1)
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-4)


def test_denoiser_loss_is_the_mean_over_its_draws_of_the_error_on_the_velocity(world):
    loss, metrics = evaluate(LOSSES["denoiser"], world)
    x0 = run(world, BATCH.s0, BATCH.s1, method="latent")
    condition = run(world.denoiser, *BATCH[0:1], *BATCH[2:5], method="condition")
    times = flow.sample_times(stream(KEY, "time"), (3, B))
    noises = jax.random.normal(stream(KEY, "noise"), (3, *x0.shape))
    draws = []
    for t, noise in zip(times, noises, strict=True):
        noisy = (1 - t)[:, None, None] * x0 + (1e-5 + (1 - 1e-5) * t)[:, None, None] * noise
        target = (1 - 1e-5) * noise - x0
        draws.append(errors(run(world.denoiser, noisy, t, condition, method="velocity"), target))
    l1, mse = np.mean(draws, axis=0)
    assert np.std(draws, axis=0).min() > 1e-3
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-4)
    assert float(metrics["mse"]) == pytest.approx(mse, rel=1e-4)
    assert float(loss) == pytest.approx(0.5 * l1 + 2.0 * mse, rel=1e-4)
    assert float(metrics["x0_std"]) == pytest.approx(float(x0.std()), **CLOSE)


def test_image_decoder_loss_weighs_l1_ssim_and_lpips_if_its_weights_are_given(world):
    loss, metrics = evaluate(LOSSES["image_decoder"], world)
    decoded, images = run(world.image_decoder, PAIRS), BATCH.images.reshape(-1, *BATCH.images.shape[2:])
    l1, _ = errors(decoded, images)
    ssim = float(image_metrics.ssim(decoded, images).mean())
    assert float(metrics["l1"]) == pytest.approx(l1, **CLOSE)
    assert float(metrics["ssim"]) == pytest.approx(ssim, rel=1e-4)
    assert float(loss) == pytest.approx(0.5 * l1 + 2.0 * (1 - ssim), rel=1e-4)
    assert "lpips" not in metrics

    perceptual = nnx.clone(world)
    perceptual.lpips = Statistic(jax.tree_util.Partial(lambda a, b: jnp.square(a - b).mean((1, 2, 3))))
    with_lpips, more = evaluate(LOSSES["image_decoder"], perceptual)
    assert float(more["lpips"]) == pytest.approx(errors(decoded, images)[1], rel=1e-4)
    assert float(with_lpips) == pytest.approx(float(loss + 0.3 * more["lpips"]), **CLOSE)


@pytest.mark.parametrize(("max_images", "used"), [(100, (0, 1, 2)), (6, (0, 1, 2)), (5, (0, 2)), (2, (0,)), (1, (0,))])
def test_image_decoder_reads_both_frames_of_windows_spread_over_the_batch(world, max_images, used):
    unread = np.setdiff1d(np.arange(B), used)
    batch = BATCH._replace(images=BATCH.images.at[unread].set(jnp.nan))
    loss = partial(image_decoder_loss, l1=1.0, ssim=0.0, lpips=0.0, max_images=max_images)
    _, metrics = evaluate(loss, world, batch)
    decoded = run(world.image_decoder, PAIRS).reshape(BATCH.images.shape)
    index = np.asarray(used)
    assert float(metrics["l1"]) == pytest.approx(errors(decoded[index], BATCH.images[index])[0], rel=1e-4)


def test_a_mean_square_term_adds_its_weight_to_the_image_decoder_loss(world):
    without, metrics = evaluate(LOSSES["image_decoder"], world)
    squared, more = evaluate(partial(LOSSES["image_decoder"], mse=3.0), world)
    images = BATCH.images.reshape(-1, *BATCH.images.shape[2:])
    error = errors(run(world.image_decoder, PAIRS), images)[1]
    assert float(more["mse"]) == pytest.approx(error, rel=1e-4)
    assert float(squared) == pytest.approx(float(without) + 3.0 * error, rel=1e-4)
    assert "mse" not in metrics  # no weight, no term


def test_image_decoder_loss_without_frames_is_refused(world):
    with pytest.raises(ValueError, match=r"objectives\.image_decoder: expected frames in the batch, found tokens only"):
        LOSSES["image_decoder"](world, BATCH._replace(images=None), KEY)


@pytest.mark.parametrize(
    ("start", "stop", "active"),
    [(0, 0, [1, 1, 1, 1]), (2, 0, [0, 0, 1, 1]), (0, 3, [1, 1, 1, 0]), (1, 2, [0, 1, 0, 0])],
)
def test_objectives_are_active_from_their_start_until_before_their_stop(start, stop, active):
    objective = Objective("rla", LOSSES["rla"], start, stop)
    assert [int(objective.active(jnp.asarray(step))) for step in range(4)] == active
    assert objective.always == all(active)
