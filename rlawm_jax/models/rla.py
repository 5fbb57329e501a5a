"""The residual latent action autoencoder: compresses the change between two frames into k tokens of width d.

METHOD.md section 3. Encoder and decoder are the same token transformer; only inputs and outputs differ.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rlawm_jax.models.layers import Block, LayerNorm, Stack, exact_linear, linear

INPUT_MODES = ("sub", "concat", "append")
DECODER_OUTPUTS = ("absolute", "residual")


class TokenTransformer(nnx.Module):
    """K learned tokens in front of projected inputs, pre-norm blocks, affine LayerNorm, one linear out.

    With `latent_dim` (the decoder) a projected latent is added to the learned tokens.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_tokens: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        latent_dim: int | None = None,
        zero_out: bool = False,
        remat: str,
        attention: str = "xla",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        # 0.2 as in the release: small beside a projected latent of the official scale, so that the decoder reads the
        # contents of z and not the order of its tokens (METHOD.md section 4)
        self.tokens = nnx.Param(0.2 * nnx.initializers.normal(1.0)(rngs.params(), (num_tokens, width), jnp.float32))
        # float32, as in the release, except `input_layer`
        self.token_proj = exact_linear(latent_dim, width, rngs=rngs) if latent_dim else None
        self.input_layer = linear(in_dim, width, dtype=dtype, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: Block(width, heads, mlp_ratio, dtype=dtype, attention=attention, rngs=rngs),
            depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm_out = LayerNorm(width)
        out_init = nnx.initializers.zeros if zero_out else None
        self.out_layer = exact_linear(width, out_dim, rngs=rngs, init=out_init)

    def __call__(self, x: Float[Array, "b n c"], latent: Float[Array, "b k d"] | None = None) -> Float[Array, "b kn o"]:
        """Outputs at the k learned positions, then at the n input positions."""
        tokens = jnp.broadcast_to(self.tokens[...], (x.shape[0], *self.tokens.shape))
        if self.token_proj is not None and latent is not None:
            tokens = tokens + self.token_proj(latent)
        x = jnp.concatenate([tokens.astype(self.dtype), self.input_layer(x)], axis=1)
        return self.out_layer(self.norm_out(self.blocks(x).astype(jnp.float32)))


class RLA(nnx.Module):
    """Encoder z = Enc(s1 - s0) and decoder s1 = Dec(s0, z), both over DINO patch tokens.

    `input_mode`, the encoder's input: "sub" is the difference, "concat" both frames along channels, "append" both along
    the sequence. `decoder_only` drops z (to measure how much s0 alone predicts). `variational` doubles the encoder's
    outputs into mean and log variance. `decoder_output` "residual" makes the decoder predict s1 - s0, which is needed
    where the width is below the token width (ours; the release is "absolute").
    """

    def __init__(
        self,
        *,
        token_width: int,
        num_tokens: int,
        token_dim: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        input_mode: str,
        decoder_output: str,
        decoder_only: bool,
        variational: bool,
        remat: str,
        attention: str = "xla",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        _check_choice("rla.input_mode", input_mode, INPUT_MODES)
        _check_choice("rla.decoder_output", decoder_output, DECODER_OUTPUTS)
        self.input_mode, self.decoder_output = input_mode, decoder_output
        self.decoder_only, self.variational = decoder_only, variational
        self.num_tokens, self.token_dim = num_tokens, token_dim
        shared = {
            "num_tokens": num_tokens,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "remat": remat,
            "attention": attention,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.encoder = TokenTransformer(
            in_dim=token_width * (2 if input_mode == "concat" else 1),
            out_dim=token_dim * (2 if variational else 1),
            **shared,
        )
        self.decoder = TokenTransformer(
            in_dim=token_width, out_dim=token_width, latent_dim=token_dim, zero_out=True, **shared
        )

    def posterior(self, s0: Float[Array, "b l c"], s1: Float[Array, "b l c"]) -> tuple[Array, Array | None]:
        """(z, None), or (mean, log variance) of z with the variational head; each [b, k, d] in float32."""
        if self.input_mode == "sub":
            x = s1 - s0
        else:
            x = jnp.concatenate([s0, s1], axis=-1 if self.input_mode == "concat" else 1)
        z = self.encoder(x)[:, : self.num_tokens].astype(jnp.float32)
        if self.variational:
            mean, log_var = jnp.split(z, 2, axis=-1)
            return mean, log_var
        return z, None

    def encode(self, s0: Float[Array, "b l c"], s1: Float[Array, "b l c"]) -> Float[Array, "b k d"]:
        """The latent action that turns s0 into s1 (the mean, if the head is variational)."""
        return self.posterior(s0, s1)[0]

    def decode(self, s0: Float[Array, "b l c"], z: Float[Array, "b k d"]) -> Float[Array, "b l c"]:
        """The tokens after z is applied to s0, in float32."""
        latent = None if self.decoder_only else z
        out = self.decoder(s0, latent)[:, self.num_tokens :].astype(jnp.float32)
        return s0 + out if self.decoder_output == "residual" else out


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"config.{field}: expected one of {', '.join(allowed)}, found {value!r}")
