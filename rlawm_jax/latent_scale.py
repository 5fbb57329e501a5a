"""From latents to flow space and back (METHOD.md 6): by one divisor, or by a mean and a deviation per dimension.

The scale is one array. []: the divisor. [2, k, d]: the mean and the standard deviation of each of a latent's k * d
numbers (not of d alone: the k tokens are positions of their own, whose means differ).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

DECAY = 0.99
# smallest deviation, in units of the root mean square of all: a number that hardly moves is not blown up further
SMALLEST = 0.01

Scale = Float[Array, "*shape"]
Latents = Float[Array, "*b k d"]


def initial_scale(config: ConfigDict) -> Scale:
    """The scale before any latent is seen: config.latent_scale.value, means 0.

    It stays, unless config.latent_scale.running. Raises ValueError for settings that do not go together.
    """
    settings = config.latent_scale
    if settings.value <= 0:
        raise ValueError(f"config.latent_scale.value: expected a positive number, found {settings.value}")
    if not settings.per_dimension:
        return jnp.asarray(settings.value, jnp.float32)
    if not settings.running:
        raise ValueError(
            "config.latent_scale.running: expected True with latent_scale.per_dimension, found False; "
            "means and deviations are measured in training"
        )
    if not config.denoiser.token_embedding:
        raise ValueError(
            "config.denoiser.token_embedding: expected True with latent_scale.per_dimension, found False; "
            "without it the denoiser cannot know which token's mean and deviation hold"
        )
    shape = (config.rla.num_tokens, config.rla.token_dim)
    return jnp.stack([jnp.zeros(shape), jnp.full(shape, settings.value)]).astype(jnp.float32)


def is_per_dimension(scale: Scale) -> bool:
    """Whether the scale holds means and deviations."""
    return scale.ndim > 0


def to_flow(z: Latents, scale: Scale) -> Latents:
    """Latents in flow space."""
    return (z - scale[0]) / scale[1] if is_per_dimension(scale) else z / scale


def from_flow(x0: Latents, scale: Scale) -> Latents:
    """Flow-space latents as the RLA decoder reads them; the inverse of `to_flow`."""
    return scale[0] + scale[1] * x0 if is_per_dimension(scale) else scale * x0


def size(scale: Scale) -> Float[Array, ""]:
    """The divisor, or the root mean square of the deviations."""
    return jnp.sqrt(jnp.square(scale[1]).mean()) if is_per_dimension(scale) else scale


def moments(z: Float[Array, "b k d"]) -> Float[Array, "2 k d"]:
    """Mean and mean square over a batch; those of micro-batches of one size average to those of the whole."""
    return jnp.stack([z.mean(axis=0), jnp.square(z).mean(axis=0)])


def followed(scale: Scale, measured: Array, done: Float[Array, ""]) -> Scale:
    """The scale after one more batch, `done` of them seen before.

    `measured` is the batch's standard deviation [], or its `moments` [2, k, d]. First the average over all steps so
    far, in which nothing of the initial scale is left; then with exponential decay.
    """
    weight = jnp.maximum(1 / (done + 1), 1 - DECAY)
    if not is_per_dimension(scale):
        return (1 - weight) * scale + weight * measured
    mean = (1 - weight) * scale[0] + weight * measured[0]
    # variances about the new mean: the difference of two averaged moments would lose small ones to rounding
    before = jnp.square(scale[1]) + jnp.square(scale[0] - mean)
    now = jnp.maximum(measured[1] - jnp.square(measured[0]), 0.0) + jnp.square(measured[0] - mean)
    variance = (1 - weight) * before + weight * now
    floor = SMALLEST**2 * variance.mean()
    return jnp.stack([mean, jnp.sqrt(jnp.maximum(variance, floor))])
