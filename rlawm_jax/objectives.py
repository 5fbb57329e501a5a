"""The training losses (METHOD.md sections 3 to 5): each reads the tokens of a batch and trains one part of the model.

A loss is `(model, batch, key) -> (loss, metrics)`. The training step differentiates it with respect to its own part
only, so everything else a loss reads (such as the denoiser's target latent) is constant by construction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlawm_jax import flow, image_metrics, latent_scale
from rlawm_jax.rng import stream
from rlawm_jax.sharding import every_nth_row
from rlawm_jax.world_model import WorldModel


class TokenBatch(NamedTuple):
    """A training batch after the backbone: tokens of each window's two frames and the actions between them."""

    s0: Float[Array, "b l c"]
    s1: Float[Array, "b l c"]
    actions: Float[Array, "b t a"]
    num_actions: Int[Array, " b"]
    robot_id: Int[Array, " b"]
    images: Float[Array, "b 2 h w 3"] | None  # the window's two frames in [0, 1], targets of the image decoder


Z_MOMENTS = "z_moments"  # the RLA's only metric that is no scalar: what a latent scale per dimension follows

Metrics = dict[str, Array]
Loss = Callable[[WorldModel, TokenBatch, Array], tuple[Array, Metrics]]


def l1_mse(prediction: Array, target: Array) -> tuple[Array, Array]:
    """Mean absolute and mean square error over all elements, in float32."""
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.abs(error).mean(), jnp.square(error).mean()


def rla_loss(model: WorldModel, batch: TokenBatch, key: Array, *, l1: float, mse: float, kl: float):
    """Reconstruction of the last frame's tokens from the first's and z: l1 * L1 + mse * MSE (+ kl * KL, variational).

    `copy_l1` is the error of predicting no change, the baseline to beat; `z_std`, or per dimension
    `Z_MOMENTS`, feeds a running latent scale.
    """
    z, log_var = model.rla.posterior(batch.s0, batch.s1)
    divergence = jnp.zeros(())
    mean = z
    if log_var is not None:
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(stream(key, "vae"), mean.shape)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_var) - 1.0 - log_var).mean()
    l1_error, mse_error = l1_mse(model.rla.decode(batch.s0, z), batch.s1)
    metrics = {
        "l1": l1_error,
        "mse": mse_error,
        "kl": divergence,
        "copy_l1": l1_mse(batch.s0, batch.s1)[0],
        "z_std": jnp.std(mean),
    }
    if latent_scale.is_per_dimension(model.latent_scale[...]):
        metrics[Z_MOMENTS] = latent_scale.moments(mean)
    return l1 * l1_error + mse * mse_error + kl * divergence, metrics


def denoiser_loss(
    model: WorldModel, batch: TokenBatch, key: Array, *, l1: float, mse: float, time_schedule: str, repeats: int
):
    """Flow matching on the latent of the window, conditioned on its first frame and actions: MSE + L1 on the velocity.

    `repeats` draws several (t, noise) pairs per window; the condition stage, which is most of the cost, runs once for
    all of them.
    """
    x0 = jax.lax.stop_gradient(model.latent(batch.s0, batch.s1))
    # outside `one_draw`, because it does not depend on time or noise
    condition = model.denoiser.condition(batch.s0, batch.actions, batch.num_actions, batch.robot_id)
    size = (repeats, x0.shape[0])
    times = flow.sample_times(stream(key, "time"), size, time_schedule)
    noises = jax.random.normal(stream(key, "noise"), (repeats, *x0.shape))

    def one_draw(t, noise):
        velocity = model.denoiser.velocity(flow.interpolate(x0, noise, t), t, condition)
        return l1_mse(velocity, flow.velocity_target(x0, noise))

    l1_error, mse_error = jax.tree.map(jnp.mean, jax.vmap(one_draw)(times, noises))
    return l1 * l1_error + mse * mse_error, {"l1": l1_error, "mse": mse_error, "x0_std": jnp.std(x0)}


def image_decoder_loss(
    model: WorldModel,
    batch: TokenBatch,
    key: Array,
    *,
    l1: float,
    ssim: float,
    lpips: float,
    max_images: int,
    mse: float = 0.0,
):
    """Decoded images: l1 * L1 + mse * MSE + ssim * (1 - SSIM) + lpips * LPIPS, on both frames of every n-th window.

    n is the smallest that leaves at most `max_images` frames, or one window. The LPIPS term needs VGG weights in the
    model and is off without them.
    """
    del key
    if batch.images is None:
        raise ValueError("objectives.image_decoder: expected frames in the batch, found tokens only")
    stride = -(-batch.s0.shape[0] // max(1, max_images // 2))
    pairs = every_nth_row((jnp.stack([batch.s0, batch.s1], axis=1), batch.images), stride)
    # both frames of a window stay adjacent, on the device that holds the window
    tokens, images = (x.reshape(-1, *x.shape[2:]) for x in pairs)
    prediction = model.decode_unclipped(tokens)
    l1_error, mse_error = l1_mse(prediction, images)
    similarity = image_metrics.ssim(prediction, images).mean()
    loss, metrics = l1 * l1_error + ssim * (1.0 - similarity), {"l1": l1_error, "ssim": similarity}
    if mse:  # as released, without it: L1 alone is a median, which leaves a small object the colour around it
        loss, metrics["mse"] = loss + mse * mse_error, mse_error
    if model.lpips is not None:
        metrics["lpips"] = model.lpips.get_value()(prediction, images).mean()
        loss = loss + lpips * metrics["lpips"]
    return loss, metrics


LOSSES: dict[str, Callable] = {"image_decoder": image_decoder_loss, "rla": rla_loss, "denoiser": denoiser_loss}


@dataclass(frozen=True)
class Objective:
    """One loss, the part of the model it trains, and the steps at which it is active (stop_step 0: to the end)."""

    part: str
    loss: Loss
    start_step: int
    stop_step: int

    @property
    def always(self) -> bool:
        """Whether the objective is active at every step."""
        return self.start_step == 0 and self.stop_step == 0

    def active(self, step: Array) -> Array:
        """Whether the objective trains at `step`, a boolean scalar."""
        return (step >= self.start_step) & ((self.stop_step == 0) | (step < self.stop_step))
