"""The flow-matching denoiser: from current tokens and robot actions to the velocity of a noisy latent (METHOD.md 4).

Two stages. `condition` runs once per prediction over the patch tokens, modulated by the actions; `velocity` runs once
per ODE step over the k noisy tokens and reads the condition through cross-attention, whose keys and values are part of
the condition and are therefore computed once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlawm_jax.models.layers import (
    GRU,
    Attention,
    LayerNorm,
    Mlp,
    Modulation,
    Stack,
    Statistic,
    TimeEmbedding,
    exact_linear,
    gelu,
    linear,
    modulate,
)

ACTION_CHANNELS = 64


class Condition(NamedTuple):
    """The flow stage's fixed inputs for one prediction; computed once, used at every ODE step."""

    keys_values: tuple[Float[Array, "n b l h e"], Float[Array, "n b l h e"]]  # of every flow block
    action_vec: Float[Array, "b c"]


class ActionEncoder(nnx.Module):
    """Rows of one robot's raw actions to one vector: Linear-GELU-Linear per row, a GRU, the last valid hidden state.

    Rows are first mapped by `scale * row + offset`, statistics of the training data; the release leaves them at 1, 0.
    Everything runs in float32, as in the release, with factors that no accelerator rounds: bfloat16 resolves a joint
    angle near 2 rad only to 0.008, about as much as one step moves it.
    """

    def __init__(self, action_dim: int, width: int, *, rngs: nnx.Rngs):
        self.action_dim = action_dim
        self.scale = Statistic(jnp.ones((action_dim,), jnp.float32))
        self.offset = Statistic(jnp.zeros((action_dim,), jnp.float32))
        self.up = exact_linear(action_dim, ACTION_CHANNELS, rngs=rngs)
        self.down = exact_linear(ACTION_CHANNELS, ACTION_CHANNELS, rngs=rngs)
        self.gru = GRU(ACTION_CHANNELS, width, rngs=rngs)

    def __call__(self, actions: Float[Array, "b t a"], num_actions: Int[Array, " b"]) -> Float[Array, "b c"]:
        # rows are padded to the widest robot of a mixture
        rows = actions[..., : self.action_dim] * self.scale[...] + self.offset[...]
        rows = self.down(gelu(self.up(rows)))
        return self.gru(rows, num_actions)


class ConditionBlock(nnx.Module):
    """AdaLN block over the patch tokens; each block has a linear for the action vector before SiLU and modulation."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, dtype: Any, attention: str = "xla", rngs: nnx.Rngs):
        self.attn = Attention(width, heads, dtype=dtype, attention=attention, rngs=rngs)
        self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype, rngs=rngs)
        # as in the release; the modulation of the flow blocks has no such linear
        self.cond_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.modulation = Modulation(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b l c"], action_vec: Float[Array, "b c"]) -> Float[Array, "b l c"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(self.cond_proj(action_vec))
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))


class FlowBlock(nnx.Module):
    """Modulated self-attention, plain cross-attention onto the condition, modulated MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, dtype: Any, attention: str = "xla", rngs: nnx.Rngs):
        self.self_attn = Attention(width, heads, dtype=dtype, attention=attention, rngs=rngs)
        # the only norm in the blocks that has parameters, as in the release
        self.cross_norm = LayerNorm(width)
        self.cross_attn = Attention(width, heads, dtype=dtype, attention=attention, rngs=rngs)
        self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype, rngs=rngs)
        self.modulation = Modulation(width, dtype=dtype, rngs=rngs)

    def keys_values(self, cond: Float[Array, "b l c"]) -> tuple[Array, Array]:
        """This block's cross-attention keys and values of the condition."""
        return self.cross_attn.keys_values(cond)

    def __call__(
        self, x: Float[Array, "b k c"], vec: Float[Array, "b c"], keys_values: tuple[Array, Array]
    ) -> Float[Array, "b k c"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(vec)
        x = x + gate_a[:, None] * self.self_attn(modulate(x, shift_a, scale_a))
        # no gate and no modulation, as in the release
        x = x + self.cross_attn.attend(self.cross_norm(x), keys_values)
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))


class Denoiser(nnx.Module):
    """condition(tokens, actions) once, then velocity(noisy latents, t, condition) at every ODE step.

    `action_dims` maps robot id to the width of its action rows; each robot has its own encoder. Extensions, off in the
    official recipes: `token_embedding` distinguishes the k noisy tokens (without it the flow treats them as a set);
    `action_in_flow` adds the action vector to the time embedding of the flow blocks.
    """

    def __init__(
        self,
        *,
        token_width: int,
        num_tokens: int,
        token_dim: int,
        action_dims: dict[int, int],
        max_horizon: int,
        width: int,
        cond_depth: int,
        flow_depth: int,
        heads: int,
        mlp_ratio: float,
        token_embedding: bool,
        action_in_flow: bool,
        remat: str,
        attention: str = "xla",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.max_horizon, self.action_in_flow, self.dtype = max_horizon, action_in_flow, dtype
        self.width = width
        self.action_encoders = nnx.Dict(
            {str(robot): ActionEncoder(dim, width, rngs=rngs) for robot, dim in sorted(action_dims.items())}
        )
        self.token_in = linear(token_width, width, dtype=dtype, rngs=rngs) if token_width != width else None
        self.cond_blocks = Stack(
            lambda rngs: ConditionBlock(width, heads, mlp_ratio, dtype=dtype, attention=attention, rngs=rngs),
            cond_depth,
            remat=remat,
            rngs=rngs,
        )
        # float32 around the flow blocks, as in the release: a thousandth of a flow step's work
        self.latent_in = exact_linear(token_dim, width, rngs=rngs)
        self.time_embedding = TimeEmbedding(width, rngs=rngs)
        self.token_embedding = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_tokens, width), jnp.float32))
            if token_embedding
            else None
        )
        self.flow_blocks = Stack(
            lambda rngs: FlowBlock(width, heads, mlp_ratio, dtype=dtype, attention=attention, rngs=rngs),
            flow_depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm_out = LayerNorm(width)
        self.out_layer = exact_linear(width, token_dim, rngs=rngs, init=nnx.initializers.zeros)

    def encode_actions(
        self, actions: Float[Array, "b t a"], num_actions: Int[Array, " b"], robot_id: Int[Array, " b"]
    ) -> Float[Array, "b c"]:
        """The action vector from the encoder of each sample's robot; zeros where robot_id is -1 (no actions known).

        Rows beyond `max_horizon` are cut, as in the release.
        """
        actions, num_actions = actions[:, : self.max_horizon], jnp.minimum(num_actions, self.max_horizon)
        vec = jnp.zeros((actions.shape[0], self.width), jnp.float32)
        # every encoder reads every sample: sorting samples by robot would need batch-dependent shapes
        for robot, encoder in self.action_encoders.items():
            vec = jnp.where((robot_id == int(robot))[:, None], encoder(actions, num_actions), vec)
        return vec.astype(self.dtype)

    def condition(
        self,
        tokens: Float[Array, "b l c"],
        actions: Float[Array, "b t a"],
        num_actions: Int[Array, " b"],
        robot_id: Int[Array, " b"],
    ) -> Condition:
        """The condition stage: `tokens` of the current frame, modulated by `num_actions` rows of raw actions."""
        action_vec = self.encode_actions(actions, num_actions, robot_id)
        x = tokens.astype(self.dtype)
        if self.token_in is not None:
            x = self.token_in(x)
        x = self.cond_blocks(x, action_vec)
        return Condition(self.flow_blocks.each(x, "keys_values"), action_vec)

    def velocity(self, x: Float[Array, "b k d"], t: Float[Array, " b"], condition: Condition) -> Float[Array, "b k d"]:
        """dx/dt of noisy latents in flow space (z / latent_scale) at time t, in float32."""
        h = self.latent_in(x)
        if self.token_embedding is not None:
            h = h + self.token_embedding[...]
        vec = self.time_embedding(t)
        if self.action_in_flow:
            vec = vec + condition.action_vec
        h = self.flow_blocks(h.astype(self.dtype), vec.astype(self.dtype), per_layer=condition.keys_values)
        # float32, because the sampler accumulates many small steps
        return self.out_layer(self.norm_out(h.astype(jnp.float32)))
