"""The world model as an environment (METHOD.md section 9): resets to a demonstration's frame, steps by action chunks.

One step is one prediction. The reward is video-aligned (VAR): the negative distance between the imagined tokens and
the same demonstration's tokens, at the same time ("corresponding") or at its end ("goal"). An episode terminates at the
end of its demonstration and is truncated after `max_chunks` predictions. Everything is a pure function of arrays on the
device; shapes: b environments, l patches, c channels, k rows of a chunk, a action.

`ImaginationEnv` works on batches. `SingleEnv` is the same environment in the form that JAX learners expect: one
environment at a time under `jax.vmap`, with automatic reset.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from rlawm_jax.flow import Sampler
from rlawm_jax.imagination import Chunk, advance
from rlawm_jax.policy.observation import decoded
from rlawm_jax.rl.demonstrations import Bank, lookup
from rlawm_jax.rng import per_sample, stream

METRICS = ("l1", "l2", "cosine")
TARGETS = ("corresponding", "goal")
OFFICIAL_SAMPLER = Sampler("euler", 30)


@dataclass(frozen=True)
class EnvSpec:
    """The rules of the environment; `success_threshold` is in units of `metric`."""

    chunk: int = 8  # action rows per prediction
    max_chunks: int = 6  # predictions until truncation
    initial_prob: float = 0.5  # probability of starting at a demonstration's first frame
    metric: str = "l1"
    target: str = "corresponding"
    reward_scale: float = 5.0
    success_threshold: float = 0.032
    terminal_bonus: float = 0.0
    reward_draws: int = 1  # predictions whose mean distance is rewarded
    observation_size: int = 128  # pixels
    observation_resize: str = "release"  # the policy's
    action_low: tuple[float, ...] = ()  # raw rows are clipped to these bounds, as the simulator clips them
    action_high: tuple[float, ...] = ()
    sampler: Sampler = OFFICIAL_SAMPLER

    def __post_init__(self) -> None:
        for field, value, choices in (("metric", self.metric, METRICS), ("target", self.target, TARGETS)):
            if value not in choices:
                raise ValueError(f"config.env.{field}: expected one of {', '.join(choices)}, found {value!r}")
        for field in ("chunk", "max_chunks", "reward_draws", "observation_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"config.env.{field}: expected 1 or more, found {getattr(self, field)}")
        low, high = self.action_low, self.action_high
        if len(low) != len(high) or any(a >= b for a, b in zip(low, high, strict=False)):
            raise ValueError(
                f"config.env.action_low, action_high: expected as many lower bounds as upper ones, each below it, or "
                f"none where actions are not clipped, found {low} and {high}"
            )
        if not 0 <= self.initial_prob <= 1:
            raise ValueError(f"config.env.initial_prob: expected a probability, found {self.initial_prob}")


class EnvState(NamedTuple):
    """State of each environment: imagined tokens, their demonstration and frame in it, number of predictions made."""

    tokens: Float[Array, "b l c"]
    episode: Int[Array, " b"]
    frame: Int[Array, " b"]
    chunks: Int[Array, " b"]


class StepOutcome(NamedTuple):
    """The result of a step; `terminated` (the demonstration is over) and `truncated` are mutually exclusive."""

    reward: Float[Array, "... b"]
    terminated: Bool[Array, "... b"]
    truncated: Bool[Array, "... b"]
    success: Bool[Array, "... b"]
    distance: Float[Array, "... b"]  # to the frame used by the reward, as rewarded

    @property
    def done(self) -> Bool[Array, "..."]:
        """Whether the episode is over, for either reason."""
        return self.terminated | self.truncated


def distance(a: Float[Array, "b l c"], b: Float[Array, "b l c"], metric: str) -> Float[Array, " b"]:
    """Mean absolute difference, mean square, or 1 - cosine of each token averaged over patches."""
    if metric == "l1":
        return jnp.abs(a - b).mean(axis=(1, 2))
    if metric == "l2":
        return jnp.square(a - b).mean(axis=(1, 2))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (1 - (a * b).sum(axis=-1) / jnp.maximum(norms, 1e-8)).mean(axis=-1)


def select(condition: Bool[Array, " b"], yes: Any, no: Any) -> Any:
    """`yes` where an environment's condition holds, else `no`, for trees with a leading batch axis."""
    return jax.tree.map(lambda y, n: jnp.where(condition.reshape(-1, *[1] * (y.ndim - 1)), y, n), yes, no)


@dataclass(frozen=True)
class ImaginationEnv:
    """The environment over batches. `model` needs encode, noise, predict and decode as in `WorldModel`."""

    spec: EnvSpec

    def reset(self, model: Any, bank: Bank, key: Array, ids: Integer[Array, " b"]) -> EnvState:
        """Draw a demonstration per environment, at its first frame or one that leaves room for a chunk; keyed by id.

        Only demonstrations longer than a chunk plus one frame are used.
        """
        # the release's rule: longer than a chunk plus the observed frame
        weights = (bank.length > self.spec.chunk + 1).astype(jnp.float32)

        def draw(key: Array) -> tuple[Array, Array]:
            keys = jax.random.split(key, 3)
            episode = jax.random.choice(keys[0], len(weights), p=weights / weights.sum())
            last = jnp.maximum(bank.length[episode] - 1 - self.spec.chunk, 0)
            start = jax.random.randint(keys[1], (), 0, last + 1)
            return episode, jnp.where(jax.random.bernoulli(keys[2], self.spec.initial_prob), 0, start)

        episode, frame = jax.vmap(draw)(per_sample(key, ids))
        return self.at(model, bank, episode.astype(jnp.int32), frame.astype(jnp.int32))

    def at(self, model: Any, bank: Bank, episode: Int[Array, " b"], frame: Int[Array, " b"]) -> EnvState:
        """Environments at given frames of given demonstrations."""
        return EnvState(lookup(bank, model, episode, frame), episode, frame, jnp.zeros_like(episode))

    def observe(self, model: Any, state: EnvState) -> Float[Array, "b s s 3"]:
        """RGB in [0, 1] decoded from the tokens, at resets and at every later step: the policy sees one domain."""
        return decoded(model, state.tokens, self.spec.observation_size, self.spec.observation_resize)

    def step(
        self,
        model: Any,
        bank: Bank,
        state: EnvState,
        actions: Float[Array, "b k a"],
        key: Array,
        ids: Integer[Array, " b"],
    ) -> tuple[EnvState, StepOutcome]:
        """Imagine the chunk of raw `actions`, clipped to the spec's bounds, without reset; noise is by (key, id).

        The state continues from one draw of the flow's noise; `reward_draws` - 1 more count in the reward only.
        """
        spec = self.spec
        if spec.action_low:
            # the world model only knows rows that a simulator accepted
            actions = jnp.clip(actions, jnp.asarray(spec.action_low), jnp.asarray(spec.action_high))
        chunk = Chunk(actions, jnp.full(len(actions), spec.chunk, jnp.int32))
        robot_id = bank.robot_id[state.episode]
        predict = partial(advance, model, state.tokens, chunk, robot_id=robot_id, ids=ids, sampler=spec.sampler)
        tokens, _ = predict(key)
        last = bank.length[state.episode] - 1
        # a chunk may extend past the end of the recording; its last frame is then the reference
        frame, chunks = jnp.minimum(state.frame + spec.chunk, last), state.chunks + 1
        target = at_end = lookup(bank, model, state.episode, last)
        if spec.target == "corresponding":
            target = lookup(bank, model, state.episode, frame)
        goal, aligned = (distance(tokens, reference, spec.metric) for reference in (at_end, target))
        if spec.reward_draws > 1:
            # only the noise is mapped over, so the condition stage is computed once for all draws
            keys = jax.vmap(partial(stream, key, "reward_draw"))(jnp.arange(1, spec.reward_draws))
            others = jax.vmap(lambda key: distance(predict(key)[0], target, spec.metric))(keys)
            aligned = (aligned + others.sum(axis=0)) / spec.reward_draws
        terminated = state.frame + spec.chunk >= last
        # where both happen at once it counts as terminated: there is no future to bootstrap from
        truncated = (chunks >= spec.max_chunks) & ~terminated
        # judged by the last frame, whichever frame the reward uses, as in the release
        success = (terminated | truncated) & (goal <= spec.success_threshold)
        reward = -spec.reward_scale * aligned + spec.terminal_bonus * success
        return EnvState(tokens, state.episode, frame, chunks), StepOutcome(
            reward, terminated, truncated, success, aligned
        )


class EnvParams(NamedTuple):
    """The inputs of a single environment: the world model (a callable module or its merged form) and the bank."""

    model: Any
    bank: Bank


@dataclass(frozen=True)
class SingleEnv:
    """One environment with automatic reset: `reset(key, params)` and `step(key, state, action, params)`.

    Actions are raw, [k, a] or flat [k * a]; observations are RGB [s, s, 3]. `params.model` is a flax.nnx module.
    """

    spec: EnvSpec

    def reset(self, key: Array, params: EnvParams) -> tuple[Float[Array, "s s 3"], EnvState]:
        """(observation, state)."""
        env = ImaginationEnv(self.spec)
        state = env.reset(params.model, params.bank, key, jnp.zeros(1, jnp.uint32))
        return env.observe(params.model, state)[0], jax.tree.map(lambda x: x[0], state)

    def step(
        self, key: Array, state: EnvState, action: Float[Array, "..."], params: EnvParams
    ) -> tuple[Float[Array, "s s 3"], EnvState, Float[Array, ""], Bool[Array, ""], dict[str, Array]]:
        """(observation, state, reward, done, info); after a done step, observation and state belong to a new episode.

        info: "terminated", "truncated", "success", "distance", and "final_observation", the old episode's last
        observation (a truncated return is bootstrapped from it).
        """
        env, ids = ImaginationEnv(self.spec), jnp.zeros(1, jnp.uint32)
        batch = jax.tree.map(lambda x: x[None], state)
        actions = action.reshape(1, self.spec.chunk, -1)
        after, outcome = env.step(params.model, params.bank, batch, actions, stream(key, "flow_noise"), ids)
        fresh = env.reset(params.model, params.bank, stream(key, "reset"), ids)
        final = env.observe(params.model, after)
        # both are computed: under vmap a branch becomes a select anyway
        new = select(outcome.done, fresh, after)
        observation = select(outcome.done, env.observe(params.model, fresh), final)
        info = {name: value[0] for name, value in outcome._asdict().items() if name != "reward"}
        info["final_observation"] = final[0]
        return observation[0], jax.tree.map(lambda x: x[0], new), outcome.reward[0], outcome.done[0], info
