"""The world model as one pytree: backbone, RLA autoencoder, denoiser, image decoder, and the statistics they need.

`WorldModel` has three main methods: `encode` turns frames into tokens, `predict` gives the tokens after a chunk of
actions, `decode` turns tokens into RGB. It is a flax.nnx module; code outside it works on its split state with plain
JAX transforms.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, UInt8
from ml_collections import ConfigDict

from rlawm_jax import flow, latent_scale
from rlawm_jax.flow import Sampler
from rlawm_jax.models.denoiser import Denoiser
from rlawm_jax.models.image_decoder import ImageDecoder
from rlawm_jax.models.layers import Statistic, compute_dtype
from rlawm_jax.models.rla import RLA
from rlawm_jax.models.vit import DinoViT, variant
from rlawm_jax.rng import per_sample

PARTS = ("image_decoder", "rla", "denoiser")
EXTERNAL = ("backbone", "lpips")


class WorldModel(nnx.Module):
    """All networks of RLA-WM (METHOD.md 2 to 5), built from a config; the config defaults are the official sizes."""

    def __init__(self, config: ConfigDict, *, backbone: DinoViT | None, rngs: nnx.Rngs):
        """Initialise every part randomly, except the given `backbone`; without one, frames cannot be encoded."""
        dtype = compute_dtype(config.dtype)
        spec = variant(config.backbone.name)
        self.image_size = config.backbone.image_size
        self.grid = spec.patch_grid((self.image_size, self.image_size))
        # weights that come from separate files and are never trained: absent until they are set
        self.backbone = nnx.data(backbone)
        self.lpips: Any = nnx.data(None)
        common = {"token_width": spec.width, "dtype": dtype, "rngs": rngs}
        self.rla = RLA(**config.rla, remat=config.remat, attention=config.attention, **common)
        self.denoiser = Denoiser(
            num_tokens=config.rla.num_tokens,
            token_dim=config.rla.token_dim,
            action_dims={int(robot): dim for robot, dim in config.denoiser.action_dims.items()},
            max_horizon=config.data.max_horizon,
            remat=config.remat,
            attention=config.attention,
            **{k: v for k, v in config.denoiser.items() if k not in ("action_dims", "time_schedule")},
            **common,
        )
        self.image_decoder = ImageDecoder(
            grid=self.grid, patch=spec.patch, **config.image_decoder, remat=config.remat, **common
        )
        # part of the model, because a latent means nothing without it
        self.latent_scale = Statistic(latent_scale.initial_scale(config))

    def encode(self, frames: UInt8[Array, "b h w 3"]) -> Float[Array, "b l c"]:
        """DINO tokens of uint8 frames whose background is already 0 (data/masks.py); float32, no gradient."""
        if self.backbone is None:
            raise ValueError("this world model was built without its backbone and cannot encode frames")
        return jax.lax.stop_gradient(self.backbone(frames.astype(jnp.float32) / 255.0).astype(jnp.float32))

    def latent(self, s0: Float[Array, "b l c"], s1: Float[Array, "b l c"]) -> Float[Array, "b k d"]:
        """The latent action between two frames, in flow space (see `latent_scale`)."""
        return latent_scale.to_flow(self.rla.encode(s0, s1), self.latent_scale[...])

    def apply_latent(self, s0: Float[Array, "b l c"], x0: Float[Array, "b k d"]) -> Float[Array, "b l c"]:
        """The tokens after the flow-space latent `x0` is applied to `s0`."""
        return self.rla.decode(s0, self.raw_latent(x0))

    def raw_latent(self, x0: Float[Array, "*b k d"]) -> Float[Array, "*b k d"]:
        """Flow-space latents as the RLA autoencoder knows them."""
        return latent_scale.from_flow(x0, self.latent_scale[...])

    def noise(self, key: Array, ids: Integer[Array, " b"]) -> Float[Array, "b k d"]:
        """Standard normal latents, one independent draw per id (the number of a window or an environment)."""
        shape = (self.rla.num_tokens, self.rla.token_dim)
        return jax.vmap(lambda k: jax.random.normal(k, shape))(per_sample(key, ids))

    def predict(
        self,
        tokens: Float[Array, "b l c"],
        actions: Float[Array, "b t a"],
        num_actions: Int[Array, " b"],
        robot_id: Int[Array, " b"],
        noise: Float[Array, "b k d"],
        sampler: Sampler,
    ) -> tuple[Float[Array, "b l c"], Float[Array, "b k d"]]:
        """One draw of the tokens `num_actions` steps ahead, and the flow-space latent it came from.

        `actions` are raw rows, padded to a common length; the same `noise` gives the same prediction.
        """
        # once, not at every ODE step: most of the flow's inputs do not change (METHOD.md section 10)
        condition = self.denoiser.condition(tokens, actions, num_actions, robot_id)
        start = sampler.temperature * noise
        x0 = flow.sample(lambda x, t: self.denoiser.velocity(x, t, condition), start, sampler.steps, sampler.solver)
        return self.apply_latent(tokens, x0), x0

    def decode(self, tokens: Float[Array, "b l c"]) -> Float[Array, "b h w 3"]:
        """RGB in [0, 1] at the backbone's input size."""
        return jnp.clip(self.decode_unclipped(tokens), 0.0, 1.0)

    def decode_unclipped(self, tokens: Float[Array, "b l c"]) -> Float[Array, "b h w 3"]:
        """The decoded image, not clipped, without the border that padded the last patches."""
        return self.image_decoder(tokens)[:, : self.image_size, : self.image_size]
