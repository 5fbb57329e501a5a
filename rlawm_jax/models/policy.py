"""Pixel policies (METHOD.md 8): behaviour cloning, its variant that learns from action-less video, and their RL heads.

A policy maps one RGB frame to a chunk of future actions. `features` is its observation encoder, `base_actions` the
cloned behaviour, `distribution` the Gaussian around it for reinforcement learning (METHOD.md section 9). Rows are
normalised to [-1, 1] over the labelled training data; `raw_actions` converts them back.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from rlawm_jax.models.layers import Block, LayerNorm, Stack, Statistic, compute_dtype, linear
from rlawm_jax.models.lora import NO_LORA, Linear, LowRank
from rlawm_jax.models.normaliser import affine_from_limits
from rlawm_jax.models.resnet import ResNet
from rlawm_jax.rng import stream

HEADS_OF_RL = ("residual", "critic")
RESIZES = ("release", "antialias")


class Perceptron(nnx.Module):
    """Linear-ReLU-dropout for every hidden width, then a linear head; without `out_dim`, the last hidden layer."""

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int | None = None,
        *,
        dropout: float = 0.0,
        low_rank: LowRank = NO_LORA,
        init: Any = None,
        out_init: Any = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        common = {"low_rank": low_rank, "dtype": dtype, "rngs": rngs}
        self.dropout = dropout
        widths = [in_dim, *hidden]
        self.hidden = nnx.List([Linear(a, b, init=init, **common) for a, b in pairwise(widths)])
        self.head = None if out_dim is None else Linear(widths[-1], out_dim, init=out_init or init, **common)

    def __call__(self, x: Float[Array, "b i"], key: Array | None = None) -> Float[Array, "b o"]:
        """`key` draws the dropped units; without one nothing is dropped."""
        for i, layer in enumerate(self.hidden):
            x = jax.nn.relu(layer(x))
            if key is not None and self.dropout > 0:
                keep = jax.random.bernoulli(stream(key, "dropout", i), 1 - self.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.dropout), 0.0)
        return x if self.head is None else self.head(x)


class QueryReader(nnx.Module):
    """Learned queries read spatial features and the robot's state by self-attention; returns all queries, flattened.

    The robot's token is a learned one, plus the projected state where there is a state (METHOD.md 13.10).
    `position_embedding` (ours; off in the release) gives the spatial tokens their positions.
    """

    def __init__(
        self,
        in_dim: int,
        cells: int,
        state_dim: int,
        *,
        width: int,
        depth: int,
        heads: int,
        queries: int,
        position_embedding: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.width, self.num_queries = dtype, width, queries

        def learned(count: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (count, width), jnp.float32))

        self.queries, self.robot = learned(queries), learned(1)
        self.positions = learned(cells) if position_embedding else None
        self.project = linear(in_dim, width, dtype=dtype, rngs=rngs)
        self.state_project = linear(state_dim, width, dtype=dtype, rngs=rngs) if state_dim else None
        self.blocks = Stack(lambda rngs: Block(width, heads, 4.0, dtype=dtype, rngs=rngs), depth, rngs=rngs)
        self.norm = LayerNorm(width)

    def __call__(
        self,
        grid: Float[Array, "b g v i"],
        state: Float[Array, "b s"] | None,
        has_state: Bool[Array, " b"] | None,
    ) -> Float[Array, "b f"]:
        batch = grid.shape[0]
        cells = self.project(grid.reshape(batch, -1, grid.shape[-1]))
        if self.positions is not None:
            cells = cells + self.positions[...].astype(self.dtype)
        robot = jnp.broadcast_to(self.robot[...].astype(self.dtype), (batch, 1, self.width))
        if self.state_project is not None and state is not None:
            token = self.state_project(state)
            token = token if has_state is None else jnp.where(has_state[:, None], token, 0.0)
            robot = robot + token[:, None]
        queries = jnp.broadcast_to(self.queries[...].astype(self.dtype), (batch, self.num_queries, self.width))
        read = self.blocks(jnp.concatenate([cells, robot, queries], axis=1))[:, -self.num_queries :]
        return self.norm(read).reshape(batch, -1)


class Policy(nnx.Module):
    """ResNet, optional state MLP, and an MLP to a chunk of actions; with `policy.rla`, queries read the ResNet's map.

    Built from a config (configs/policy.py lists the fields). With `policy.residual.enabled` it also has the heads of
    reinforcement learning and, for a positive rank, low-rank branches on the base's convolutions and MLPs.
    """

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs):
        c, dtype = config.policy, compute_dtype(config.dtype)
        _check_sizes(c)
        low_rank = LowRank(c.residual.lora_rank, c.residual.lora_alpha) if c.residual.enabled else NO_LORA
        common = {"dtype": dtype, "rngs": rngs}
        self.image_size, self.resize, self.state_dim = c.image_size, c.resize, c.state_dim
        self.horizon, self.executed, self.action_dim = c.horizon, c.executed, c.action_dim
        self.encoder = ResNet(widths=c.widths, blocks=c.blocks, low_rank=low_rank, **common)
        for optional in ("reader", "state_encoder", "latent_head", "residual", "critic"):
            setattr(self, optional, nnx.data(None))
        if c.rla.enabled:
            cells = (-(-c.image_size // self.encoder.stride)) ** 2
            shape = {name: c.rla[name] for name in ("width", "depth", "heads", "queries", "position_embedding")}
            self.reader = QueryReader(c.widths[-1], cells, c.state_dim, **shape, **common)
            features, hidden = c.rla.queries * c.rla.width, c.rla.hidden
        else:
            if c.state_dim:
                self.state_encoder = Perceptron(c.state_dim, c.state_hidden, low_rank=low_rank, **common)
            features, hidden = c.widths[-1] + (c.state_hidden[-1] if c.state_dim else 0), c.hidden
        self.num_features = features
        self.trunk = Perceptron(features, hidden, dropout=c.dropout, low_rank=low_rank, **common)
        self.action_head = Linear(hidden[-1], c.horizon * c.action_dim, low_rank=low_rank, **common)
        if c.rla.enabled:
            self.latent_head = linear(hidden[-1], c.rla.latent_dim, **common)
        if c.residual.enabled:
            self.mean_scale, self.std_scale = c.residual.mean_scale, c.residual.std_scale
            outputs = 2 * c.executed * c.action_dim
            # zeros: learning starts exactly from the clone; orthogonal: as in the release
            zeros, orthogonal = nnx.initializers.zeros, nnx.initializers.orthogonal()
            self.residual = Perceptron(features, c.residual.hidden, outputs, out_init=zeros, **common)
            self.critic = Perceptron(features, c.residual.critic_hidden, 1, init=orthogonal, **common)
        # normalised = raw * scale + offset; set by `set_limits`
        self.action_scale, self.action_offset = Statistic(jnp.ones(c.action_dim)), Statistic(jnp.zeros(c.action_dim))
        # one unused number where there is no state: checkpoints cannot hold empty arrays
        width = max(c.state_dim, 1)
        self.state_scale, self.state_offset = Statistic(jnp.ones(width)), Statistic(jnp.zeros(width))

    def features(
        self,
        images: Float[Array, "b h w 3"],
        state: Float[Array, "b s"] | None = None,
        has_state: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b f"]:
        """Features of RGB images in [0, 1] of any size, resized to `image_size` by `resized`; float32.

        `state` is raw, and required if the policy was built with one, except for samples `has_state` marks as without.
        """
        if self.state_dim and state is None and self.reader is None:
            raise ValueError(f"policy: expected a state of {self.state_dim} numbers beside the images, found none")
        grid = self.encoder(resized(images, self.image_size, self.resize) * 2.0 - 1.0)
        if state is not None:
            state = state * self.state_scale[...] + self.state_offset[...]
        if self.reader is not None:
            return self.reader(grid, state, has_state).astype(jnp.float32)
        seen = grid.mean(axis=(1, 2))
        if self.state_encoder is not None and state is not None:
            seen = jnp.concatenate([seen, self.state_encoder(state)], axis=-1)
        return seen.astype(jnp.float32)

    def base_actions(self, features: Float[Array, "b f"], key: Array | None = None) -> Float[Array, "b n a"]:
        """The cloned chunk, normalised; `key` turns dropout on."""
        return self._actions(self.trunk(features, key))

    def actions_and_latent(
        self, features: Float[Array, "b f"], key: Array | None = None
    ) -> tuple[Float[Array, "b n a"], Float[Array, "b z"]]:
        """The cloned chunk and the flow-space latent action it corresponds to (used only to train BC + RLA)."""
        if self.latent_head is None:
            raise ValueError("policy: expected config.policy.rla.enabled for a latent head, found a policy without")
        hidden = self.trunk(features, key)
        return self._actions(hidden), self.latent_head(hidden).astype(jnp.float32)

    def _actions(self, hidden: Float[Array, "b o"]) -> Float[Array, "b n a"]:
        return self.action_head(hidden).astype(jnp.float32).reshape(-1, self.horizon, self.action_dim)

    def distribution(self, features: Float[Array, "b f"]) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """Mean and standard deviation of the executed rows, flattened, normalised: the base plus a bounded residual.

        mean = base + 0.1 tanh(m), std = 0.1 softplus(s) (METHOD.md 9); the head that gives m and s starts at zero,
        so that initially mean is the base's and std is 0.069.
        """
        if self.residual is None:
            raise ValueError("policy: expected the heads of reinforcement learning, found none; see with_residual")
        # without dropout, which would add noise to the ratio of two log-probabilities
        base = self.base_actions(features)[:, : self.executed].reshape(features.shape[0], -1)
        mean, std = jnp.split(self.residual(features).astype(jnp.float32), 2, axis=-1)
        return base + self.mean_scale * jnp.tanh(mean), self.std_scale * jax.nn.softplus(std)

    def value(self, features: Float[Array, "b f"]) -> Float[Array, " b"]:
        """The critic's estimate of the return."""
        if self.critic is None:
            raise ValueError("policy: expected the heads of reinforcement learning, found none; see with_residual")
        return self.critic(features).astype(jnp.float32)[:, 0]

    def best_actions(self, features: Float[Array, "b f"]) -> Float[Array, "b k a"]:
        """The rows to execute, normalised, deterministic: the mean after reinforcement learning, else the base's."""
        if self.residual is None:
            return self.base_actions(features)[:, : self.executed]
        return self.distribution(features)[0].reshape(-1, self.executed, self.action_dim)

    def raw_actions(self, normalised: Float[Array, "... a"]) -> Float[Array, "... a"]:
        """Normalised rows converted to the data's units, not clipped."""
        return (normalised - self.action_offset[...]) / self.action_scale[...]

    def normalise(self, raw: Float[Array, "... a"]) -> Float[Array, "... a"]:
        """Raw rows normalised to [-1, 1] over the labelled training data."""
        return raw * self.action_scale[...] + self.action_offset[...]

    def set_limits(self, actions: np.ndarray, states: np.ndarray | None = None) -> None:
        """Fit the normalisers on rows [n, a] (and [n, s]) of the labelled training episodes."""
        for name, rows in (("action", actions), ("state", states)):
            if rows is None:
                continue
            scale, offset = affine_from_limits(*(end(axis=0).astype(np.float64) for end in (rows.min, rows.max)))
            getattr(self, f"{name}_scale").set_value(jnp.asarray(scale, jnp.float32))
            getattr(self, f"{name}_offset").set_value(jnp.asarray(offset, jnp.float32))


def resized(images: Float[Array, "b h w 3"], size: int, resize: str) -> Float[Array, "b s s 3"]:
    """Images resized bilinearly to squares of `size` pixels; unchanged if they have that size.

    "release": only the nearest four pixels count, as in torch without antialiasing. "antialias" (ours): all that an
    output pixel covers count.
    """
    shape = (images.shape[0], size, size, 3)
    if images.shape == shape:
        return images
    return jax.image.resize(images, shape, "linear", antialias=resize == "antialias")


def _check_sizes(c: ConfigDict) -> None:
    """Raise ValueError naming the first field from which no network can be built."""
    if not 1 <= c.executed <= c.horizon:
        raise ValueError(f"config.policy.executed: expected between 1 and horizon={c.horizon} rows, found {c.executed}")
    if c.resize not in RESIZES:
        raise ValueError(f"config.policy.resize: expected one of {', '.join(RESIZES)}, found {c.resize!r}")
    positive = {"image_size": c.image_size, "action_dim": c.action_dim}
    if c.rla.enabled:
        positive |= {f"rla.{key}": c.rla[key] for key in ("width", "depth", "heads", "queries", "latent_dim")}
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"config.policy.{name}: expected at least 1, found {value}")
    hidden = {"hidden": c.hidden, "rla.hidden": c.rla.hidden, "state_hidden": c.state_hidden}
    hidden |= {"residual.hidden": c.residual.hidden, "residual.critic_hidden": c.residual.critic_hidden}
    for name, widths in hidden.items():
        if not len(widths) or min(widths) < 1:
            raise ValueError(f"config.policy.{name}: expected positive widths, at least one, found {tuple(widths)}")
    if not 0 <= c.dropout < 1:
        raise ValueError(f"config.policy.dropout: expected a probability below 1, found {c.dropout}")


def with_residual(policy: Policy, config: ConfigDict, rngs: nnx.Rngs) -> tuple[Policy, ConfigDict]:
    """The same policy with new heads of reinforcement learning, which acts exactly as before, and its config.

    Sizes of heads and low-rank branches come from `config.policy.residual`. Raises ValueError for a policy that
    already has them.
    """
    if policy.residual is not None:
        raise ValueError("policy: expected one without the heads of reinforcement learning, found one that has them")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.policy.residual.enabled = True
    key, graphdef = rngs.params(), nnx.graphdef(nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0))))
    # compiled as one program: running the initialisers one by one would take longer
    grown = nnx.merge(graphdef, jax.jit(lambda key: nnx.state(Policy(config, rngs=nnx.Rngs(key))))(key))
    nnx.update(grown, nnx.state(policy))
    return grown, config


def trainable(path: tuple, value: Any) -> bool:
    """Whether reinforcement learning trains a leaf: residual head, critic, low-rank branches."""
    return isinstance(value, nnx.Param) and (path[0] in HEADS_OF_RL or "lora" in path)
