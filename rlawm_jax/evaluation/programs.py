"""What open-loop evaluation computes on the device: pure functions of a split world model, jitted by `OpenLoop`.

Shapes: n chunks of a rollout, b windows of a batch, l patches, c channels, k x d latents.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from rlawm_jax.flow import Sampler
from rlawm_jax.image_metrics import Lpips, psnr, ssim
from rlawm_jax.imagination import Chunk, imagine
from rlawm_jax.rng import stream


def encode(graphdef: nnx.GraphDef, state: nnx.State, frames: UInt8[Array, "t b h w 3"]) -> Float[Array, "t b l c"]:
    """Tokens of frames."""
    tokens = nnx.merge(graphdef, state).encode(frames.reshape(-1, *frames.shape[2:]))
    return tokens.reshape(*frames.shape[:2], *tokens.shape[1:])


def roll(
    graphdef: nnx.GraphDef, sampler: Sampler, state: nnx.State, key: Array, given: tuple[Array, Chunk, Array, Array]
) -> tuple[Array, Array]:
    """Tokens after every chunk and the sampled raw latents; `given` is (start, chunks, robot_id, ids)."""
    model, (start, chunks, robot_id, ids) = nnx.merge(graphdef, state), given
    rollout = imagine(model, start, chunks, key, robot_id=robot_id, ids=ids, sampler=sampler)
    return rollout.tokens, model.raw_latent(rollout.latents)


def roll_random(graphdef: nnx.GraphDef, state: nnx.State, key: Array, given: tuple[Array, Chunk, Array]) -> Array:
    """Tokens after every chunk when latents are pure noise; `given` is (start, chunks, ids)."""
    model, (start, chunks, ids) = nnx.merge(graphdef, state), given

    def step(tokens: Array, i: Array) -> tuple[Array, Array]:
        tokens = model.apply_latent(tokens, model.noise(stream(key, "flow_noise", i), ids))
        return tokens, tokens

    return jax.lax.scan(step, start, jnp.arange(len(chunks.num_actions)))[1]


def roll_latents(graphdef: nnx.GraphDef, state: nnx.State, start: Array, latents: Array) -> Array:
    """Tokens after every chunk when its raw latent is the same for every window: latents [n, k, d]."""
    model = nnx.merge(graphdef, state)

    def step(tokens: Array, latent: Array) -> tuple[Array, Array]:
        tokens = model.rla.decode(tokens, jnp.broadcast_to(latent, (len(tokens), *latent.shape)))
        return tokens, tokens

    return jax.lax.scan(step, start, latents)[1]


def true_latents(graphdef: nnx.GraphDef, state: nnx.State, start: Array, truth: Array) -> Array:
    """Raw latents [n, b, k, d] of the true tokens at each chunk's start and end; start [b, l, c] and truth [n, ...]."""
    model = nnx.merge(graphdef, state)
    before = jnp.concatenate([start[None], truth[:-1]])
    return jax.lax.map(lambda pair: model.rla.encode(*pair), (before, truth))


def reconstruct(graphdef: nnx.GraphDef, state: nnx.State, start: Array, truth: Array) -> tuple[Array, Array]:
    """Tokens decoded from the true pair's raw latent, and that latent."""
    model = nnx.merge(graphdef, state)
    latent = model.rla.encode(start, truth)
    return model.rla.decode(start, latent), latent


def decode(graphdef: nnx.GraphDef, state: nnx.State, tokens: Array) -> Array:
    """Decoded images."""
    return nnx.merge(graphdef, state).decode(tokens)


def halfway(graphdef: nnx.GraphDef, state: nnx.State, key: Array, pair: tuple[Array, Array], ids: Array) -> Array:
    """Tokens decoded from half noise, half latent."""
    model, (start, truth) = nnx.merge(graphdef, state), pair
    return model.apply_latent(start, 0.5 * (model.noise(key, ids) + model.latent(start, truth)))


def errors(
    graphdef: nnx.GraphDef,
    weights: tuple[nnx.State, Lpips | None],
    tokens: Float[Array, "b l c"],
    given: tuple[Float[Array, "b l c"], Float[Array, "b l c"], Bool[Array, "b l"]],
    images: Float[Array, "b h w 3"] | None,
    *,
    threshold: float,
) -> dict[str, Float[Array, " b"]]:
    """Errors of predicted tokens, and of the images decoded from them where true images are given."""
    (state, lpips), (start, truth, moving) = weights, given
    error = jnp.abs(tokens - truth).mean(axis=-1)
    changed = jnp.abs(truth - start).mean(axis=-1) > threshold
    metrics = {
        "dino_l1": error.mean(axis=-1),
        # 0 / 0 is deliberately NaN: without such a patch there is no value
        "dino_l1_moving": (error * moving).sum(axis=-1) / moving.sum(axis=-1),
        "dino_l1_changed": (error * changed).sum(axis=-1) / changed.sum(axis=-1),
    }
    if images is not None:
        # the decoder outputs the frame padded to whole patches
        decoded = nnx.merge(graphdef, state).decode(tokens)[:, : images.shape[1], : images.shape[2]]
        metrics |= {"psnr": psnr(decoded, images), "ssim": ssim(decoded, images)}
        if lpips is not None:
            metrics["lpips"] = lpips(decoded, images)
    return metrics
