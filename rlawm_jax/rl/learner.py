"""What every learner shares: its inputs, the imagined returns of a policy, and the compiled, sharded program.

A learner's `iteration` is a pure function of (state, frozen); `Learner.run` scans it, so that many iterations run
without host synchronisation. Every random draw is keyed by (seed, iteration, step, environment), never by a device.
`rl/ppo_learner.py` and `rl/pathwise.py` are the two learners. Shapes: n steps of a rollout (leading), b environments,
s pixels, k rows of a chunk, a action, e = k a.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt
from ml_collections import ConfigDict

from rlawm_jax.rl.demonstrations import Bank, bank_shardings
from rlawm_jax.rl.env import EnvState, ImaginationEnv
from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.ppo import Metrics
from rlawm_jax.rng import stream
from rlawm_jax.sharding import batch_sharding, on_mesh, replicated, tree_shardings
from rlawm_jax.training.nonfinite import STOP, guarded, with_flags

# parts of a learner's state with one row per environment; all others are the same on every device
BATCHED = {"env", "observation", "episode_return", "discounted"}


class Frozen(NamedTuple):
    """Inputs that are never trained: the rest of the policy, the world model, the demonstrations."""

    policy: nnx.State
    model: nnx.State
    bank: Bank


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """Everything static: graphs of the policy and the world model, environment rules, optimizer, sizes."""

    policy: nnx.GraphDef
    model: nnx.GraphDef
    env: ImaginationEnv
    tx: optax.GradientTransformation
    num_envs: int
    num_steps: int
    seed: int
    group_size: int = 1  # environments that share every start and every draw of the flow's noise
    on_trace: Callable[[], None] = field(default=lambda: None)  # called whenever an iteration is traced

    section = ""  # of the config, for messages

    @property
    @abstractmethod
    def exploration(self) -> Exploration:
        """How the noise of a chunk's rows correlates."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.group_size < 1 or self.num_envs % self.group_size:
            raise ValueError(
                f"config.{self.section}.group_size: expected a divisor of num_envs = {self.num_envs}, found "
                f"{self.group_size}"
            )

    @abstractmethod
    def init(self, params: nnx.State, frozen: Frozen) -> Any:
        """The state before the first iteration: every environment newly reset."""

    @abstractmethod
    def iteration(self, state: Any, frozen: Frozen) -> tuple[Any, Metrics]:
        """One update of the policy; metrics are float32 scalars."""

    def run(self, state: Any, frozen: Frozen, iterations: int) -> tuple[Any, Metrics]:
        """Run several iterations; metrics have shape [iterations]."""
        return jax.lax.scan(lambda s, _: self.iteration(s, frozen), state, length=iterations)

    def returns(
        self, params: nnx.State, frozen: Frozen, episode: Int[Array, " b"], frame: Int[Array, " b"], key: Array
    ) -> dict[str, Float[Array, " b"]]:
        """Undiscounted imagined "return", "success" and "steps" of the policy's mean actions from given frames.

        One episode per environment, until termination or truncation; with the same key all policies get the same noise.
        """
        policy, model = self._merge(params, frozen.policy), nnx.merge(self.model, frozen.model)

        def act(env: EnvState, i: Array) -> Array:
            mean, _ = policy.distribution(policy.features(self.env.observe(model, env)))
            return self._raw(policy, mean)

        return self._play(act, frozen, episode, frame, key)

    def returns_of_actions(
        self,
        actions: Float[Array, "n b k a"],
        frozen: Frozen,
        episode: Int[Array, " b"],
        frame: Int[Array, " b"],
        key: Array,
    ) -> dict[str, Float[Array, " b"]]:
        """Like `returns`, but for given raw actions; n is at least `max_chunks`."""
        return self._play(lambda env, i: actions[i], frozen, episode, frame, key)

    def _play(
        self,
        act: Callable[[EnvState, Array], Array],
        frozen: Frozen,
        episode: Int[Array, " b"],
        frame: Int[Array, " b"],
        key: Array,
    ) -> dict[str, Float[Array, " b"]]:
        model = nnx.merge(self.model, frozen.model)
        ids = jnp.arange(len(episode), dtype=jnp.uint32)
        start = self.env.at(model, frozen.bank, episode, frame)
        zeros = jnp.zeros(len(episode))

        def step(carry: tuple, i: Array) -> tuple[tuple, None]:
            env, total, over, success, steps = carry
            noise = stream(key, "evaluation_noise", i)
            env, outcome = self.env.step(model, frozen.bank, env, act(env, i), noise, ids)
            total = total + jnp.where(over, 0.0, outcome.reward)
            success = success | (outcome.success & ~over)
            return (env, total, over | outcome.done, success, steps + ~over), None

        none = jnp.zeros(len(episode), bool)
        carry = (start, zeros, none, none, zeros)
        (_, total, _, success, steps), _ = jax.lax.scan(step, carry, jnp.arange(self.env.spec.max_chunks))
        return {"return": total, "success": success.astype(jnp.float32), "steps": steps}

    def _merge(self, params: nnx.State, rest: nnx.State) -> Any:
        return nnx.merge(self.policy, params, rest)

    def _raw(self, policy: Any, action: Float[Array, "b e"]) -> Float[Array, "b k a"]:
        return policy.raw_actions(action.reshape(len(action), self.env.spec.chunk, -1))

    @property
    def _ids(self) -> UInt[Array, " b"]:
        return jnp.arange(self.num_envs, dtype=jnp.uint32)

    @property
    def _worlds(self) -> UInt[Array, " b"]:
        """The ids that key starts and noise: each environment's group."""
        return self._ids // self.group_size

    def _key(self, name: str, *ids: Any) -> Array:
        return stream(jax.random.key(self.seed), name, *ids)

    def _normal(self, name: str, iteration: Array, step: Array, width: int) -> Float[Array, "b e"]:
        key = self._key(name, iteration, step)
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (width,)))(self._ids)


def is_critic(path: tuple) -> bool:
    """Whether a leaf of a policy's trained parameters belongs to the critic."""
    return jax.tree_util.keystr(path[:1], simple=True) == "critic"


def make_policy_optimizer(config: ConfigDict, *trained: str) -> optax.GradientTransformation:
    """AdamW with a separate learning rate for the critic, after clipping the global gradient norm.

    `config` is a learner's section; parts not in `trained` ("policy", "critic"; none: both) stay as they are.
    """
    rates = {"policy": config.learning_rate, "critic": config.critic_learning_rate}
    parts: dict[Any, Any] = {
        name: optax.adamw(rate, weight_decay=config.weight_decay)
        if not trained or name in trained
        else optax.set_to_zero()
        for name, rate in rates.items()
    }

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "critic" if is_critic(path) else "policy", params)

    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.multi_transform(parts, labels))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Environments over (data, fsdp); parameters, optimizer and counters replicated: a policy is small."""
    split, whole = batch_sharding(mesh), replicated(mesh)

    def place(path: tuple, _: Any) -> jax.sharding.NamedSharding:
        return split if any(getattr(key, "name", None) in BATCHED for key in path) else whole

    return jax.tree_util.tree_map_with_path(place, state)


def frozen_shardings(frozen: Frozen, mesh: Mesh) -> Frozen:
    """The world model as in training, the bank's frames over (data, fsdp), the policy replicated."""
    policy = jax.tree.map(lambda _: replicated(mesh), frozen.policy)
    return Frozen(policy, tree_shardings(frozen.model, mesh), bank_shardings(frozen.bank, mesh))


def jit_run(
    learner: Learner, state: Any, frozen: Frozen, mesh: Mesh, iterations: int, on_nonfinite: str = STOP
) -> jax.stages.Wrapped:
    """`learner.run` over `iterations`, guarded, under `jax.jit`; inputs and outputs are sharded, the state is donated.

    Every metric has a matching `NAME/finite`. If any is 0, nothing from the whole call is kept (`guarded`).
    """
    placed = state_shardings(state, mesh)

    def run(state: Any, frozen: Frozen) -> tuple[Any, Metrics]:
        state, metrics = learner.run(state, frozen, iterations)
        return state, with_flags(metrics)

    return jax.jit(
        on_mesh(guarded(run, on_nonfinite), mesh),
        in_shardings=(placed, frozen_shardings(frozen, mesh)),
        out_shardings=(placed, replicated(mesh)),
        donate_argnums=0,
    )
