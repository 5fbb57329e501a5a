"""The learner: rollout in imagination, reward, advantages and PPO epochs as one compiled program.

`Learner.iteration` is a pure function of (state, frozen); `Learner.run` scans it, so that many iterations run
without host synchronisation. Every random draw is keyed by (seed, iteration, step, environment), never by a device.
Shapes: n steps of a rollout (leading), b environments, s pixels, k rows of a chunk, a action, e = k a.
"""

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
from rlawm_jax.rl.env import EnvState, ImaginationEnv, StepOutcome, select
from rlawm_jax.rl.ppo import Metrics, PPOSpec, Samples, gae, leave_one_out, log_prob, returns_to_go, update
from rlawm_jax.rng import stream
from rlawm_jax.sharding import batch_sharding, on_mesh, replicated, tree_shardings
from rlawm_jax.training.nonfinite import STOP, guarded, with_flags

RETURN_DECAY = 0.99  # of the running variance used for reward normalisation


class Frozen(NamedTuple):
    """Inputs that are never trained: the rest of the policy, the world model, the demonstrations."""

    policy: nnx.State
    model: nnx.State
    bank: Bank


class ReturnScale(NamedTuple):
    """Running variance of the discounted return, used to divide rewards where the config enables it."""

    discounted: Float[Array, " b"]
    variance: Float[Array, ""]
    weight: Float[Array, ""]  # how much of `variance` is filled


class LearnerState(NamedTuple):
    """The state carried from iteration to iteration."""

    iteration: Int[Array, ""]
    params: nnx.State
    opt_state: Any
    env: EnvState
    observation: Float[Array, "b s s 3"]
    episode_return: Float[Array, " b"]  # so far, undiscounted
    scale: ReturnScale


class Rollout(NamedTuple):
    """A rollout, time first."""

    observation: Float[Array, "n b s s 3"]
    action: Float[Array, "n b e"]
    log_prob: Float[Array, "n b"]
    value: Float[Array, "n b"]
    next_value: Float[Array, "n b"]  # of the state that the step led to; meaningless after termination
    reward: Float[Array, "n b"]
    outcome: StepOutcome
    episode_return: Float[Array, "n b"]  # including this step


@dataclass(frozen=True)
class Learner:
    """Everything static: graphs of the policy and the world model, environment rules, optimizer, sizes."""

    policy: nnx.GraphDef
    model: nnx.GraphDef
    env: ImaginationEnv
    ppo: PPOSpec
    tx: optax.GradientTransformation
    num_envs: int
    num_steps: int
    seed: int
    group_size: int = 1  # environments that share every start and every draw of the flow's noise
    normalise_rewards: bool = False
    on_trace: Callable[[], None] = field(default=lambda: None)  # called whenever an iteration is traced

    def __post_init__(self) -> None:
        total = self.num_envs * self.num_steps
        if total % self.ppo.minibatch:
            raise ValueError(
                f"config.ppo.minibatch: expected a divisor of num_envs x num_steps = {self.num_envs} x "
                f"{self.num_steps} = {total}, found {self.ppo.minibatch}"
            )
        if self.group_size < 1 or self.num_envs % self.group_size:
            raise ValueError(
                f"config.ppo.group_size: expected a divisor of num_envs = {self.num_envs}, found {self.group_size}"
            )

    def init(self, params: nnx.State, frozen: Frozen) -> LearnerState:
        """The state before the first iteration: every environment newly reset."""
        model = nnx.merge(self.model, frozen.model)
        env = self.env.reset(model, frozen.bank, self._key("first_reset"), self._worlds)
        return LearnerState(
            iteration=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.tx.init(params),
            env=env,
            observation=self.env.observe(model, env),
            episode_return=jnp.zeros(self.num_envs),
            scale=ReturnScale(jnp.zeros(self.num_envs), jnp.zeros(()), jnp.zeros(())),
        )

    def run(self, state: LearnerState, frozen: Frozen, iterations: int) -> tuple[LearnerState, Metrics]:
        """Run several iterations; metrics have shape [iterations]."""
        return jax.lax.scan(lambda s, _: self.iteration(s, frozen), state, length=iterations)

    def iteration(self, state: LearnerState, frozen: Frozen) -> tuple[LearnerState, Metrics]:
        """Roll out, score, update; metrics are float32 scalars."""
        self.on_trace()
        state, rollout = self._rollout(state, frozen)
        rewards, scale, factor = rollout.reward, state.scale, jnp.ones(())
        if self.normalise_rewards:
            scale, factor = self._return_scale(scale, rollout)
            rewards = rewards * factor
        outcome = rollout.outcome
        if self.ppo.critic:
            values = rollout.value, rollout.next_value
            ends = outcome.terminated, outcome.truncated
            advantages, targets = gae(rewards, *values, *ends, self.ppo.gamma, self.ppo.gae_lambda)
        else:
            advantages = targets = returns_to_go(rewards, outcome.done, self.ppo.gamma)
        advantages = leave_one_out(advantages, self.group_size)
        fields = rollout.observation, rollout.action, rollout.log_prob, advantages, targets
        samples = Samples(*(x.reshape(-1, *x.shape[2:]) for x in fields))
        params, opt_state, metrics = update(
            state.params,
            state.opt_state,
            samples,
            self._key("minibatches", state.iteration),
            forward=lambda params, observation: self._forward(params, frozen.policy, observation),
            tx=self.tx,
            spec=self.ppo,
        )
        metrics |= _rollout_metrics(rollout, advantages, targets) | {"reward_factor": factor}
        state = state._replace(iteration=state.iteration + 1, params=params, opt_state=opt_state, scale=scale)
        return state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

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

    def _rollout(self, state: LearnerState, frozen: Frozen) -> tuple[LearnerState, Rollout]:
        """Decoding is the expensive part, so each step decodes once: the policy's next observation.

        The value after a step is that of the next observation, except where the episode was truncated and the next
        observation is another episode's: those last tokens are stored and decoded together at the end.
        """
        policy, model = self._merge(state.params, frozen.policy), nnx.merge(self.model, frozen.model)
        slots = -(-self.num_steps // self.env.spec.max_chunks)  # an environment is truncated at most this often

        def step(carry: tuple, i: Array) -> tuple[tuple, tuple]:
            env, observation, so_far, cut, cuts = carry
            features = policy.features(observation)
            mean, std = policy.distribution(features)
            white = self._normal("action", state.iteration, i, mean.shape[-1])
            action = mean + std * self.ppo.exploration.colour(white)
            drawn = log_prob(action, mean, std, self.ppo.exploration)
            noise = self._key("flow_noise", state.iteration, i)
            after, outcome = self.env.step(model, frozen.bank, env, self._raw(policy, action), noise, self._worlds)
            fresh = self.env.reset(model, frozen.bank, self._key("reset", state.iteration, i), self._worlds)
            total = so_far + outcome.reward
            here = (jnp.arange(slots)[:, None] == cuts) & outcome.truncated
            cut = jnp.where(here[..., None, None], after.tokens, cut)
            row = observation, action, drawn, policy.value(features), outcome, total, cuts
            env = select(outcome.done, fresh, after)
            so_far = jnp.where(outcome.done, 0.0, total)
            return (env, self.env.observe(model, env), so_far, cut, cuts + outcome.truncated), row

        cut = jnp.zeros((slots, *state.env.tokens.shape), state.env.tokens.dtype)
        carry = (state.env, state.observation, state.episode_return, cut, jnp.zeros(self.num_envs, jnp.int32))
        carry, rows = jax.lax.scan(step, carry, jnp.arange(self.num_steps))
        env, observation, so_far, cut, _ = carry
        looks, actions, log_probs, values, outcomes, totals, slot = rows

        def value_of(tokens: Array) -> Array:
            return policy.value(policy.features(self.env.observe(model, env._replace(tokens=tokens))))

        last = policy.value(policy.features(observation))
        following = jnp.concatenate([values[1:], last[None]])
        at_cut = jnp.take_along_axis(jax.lax.map(value_of, cut), jnp.minimum(slot, slots - 1), axis=0)
        next_values = jnp.where(outcomes.truncated, at_cut, following)
        rollout = Rollout(looks, actions, log_probs, values, next_values, outcomes.reward, outcomes, totals)
        return state._replace(env=env, observation=observation, episode_return=so_far), rollout

    def _forward(self, params: nnx.State, rest: nnx.State, observation: Array) -> tuple[Array, Array, Array]:
        policy = self._merge(params, rest)
        features = policy.features(observation)
        return *policy.distribution(features), policy.value(features)

    def _merge(self, params: nnx.State, rest: nnx.State) -> Any:
        return nnx.merge(self.policy, params, rest)

    def _raw(self, policy: Any, action: Float[Array, "b e"]) -> Float[Array, "b k a"]:
        return policy.raw_actions(action.reshape(len(action), self.env.spec.chunk, -1))

    def _return_scale(self, scale: ReturnScale, rollout: Rollout) -> tuple[ReturnScale, Array]:
        """The running variance with this rollout's discounted returns, and the factor that multiplies rewards."""

        def step(discounted: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
            reward, done = row
            total = self.ppo.gamma * discounted + reward
            return jnp.where(done, 0.0, total), total

        discounted, totals = jax.lax.scan(step, scale.discounted, (rollout.reward, rollout.outcome.done))
        weight = RETURN_DECAY * scale.weight + (1 - RETURN_DECAY)
        variance = RETURN_DECAY * scale.variance + (1 - RETURN_DECAY) * totals.var()
        return ReturnScale(discounted, variance, weight), jax.lax.rsqrt(variance / weight + 1e-8)

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


def _rollout_metrics(rollout: Rollout, advantages: Array, targets: Array) -> Metrics:
    done = rollout.outcome.done
    finished = jnp.maximum(done.sum(), 1)
    unexplained = jnp.var(targets - rollout.value) / jnp.maximum(jnp.var(targets), 1e-8)
    return {
        "reward": rollout.reward.mean(),
        "distance": rollout.outcome.distance.mean(),
        "episodes": done.sum(),
        "episode_return": (rollout.episode_return * done).sum() / finished,
        "success": (rollout.outcome.success & done).sum() / finished,
        "truncated": rollout.outcome.truncated.sum() / finished,
        "advantage_std": advantages.std(),
        "explained_variance": 1 - unexplained,
    }


def make_policy_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with a separate learning rate for the critic, after clipping the global gradient norm (config.ppo)."""

    def label(path: tuple, _: Any) -> str:
        return "critic" if jax.tree_util.keystr(path[:1], simple=True) == "critic" else "policy"

    rates = {"policy": config.learning_rate, "critic": config.critic_learning_rate}
    parts: dict[Any, Any] = {name: optax.adamw(rate, weight_decay=config.weight_decay) for name, rate in rates.items()}
    labelled = optax.multi_transform(parts, lambda tree: jax.tree_util.tree_map_with_path(label, tree))
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), labelled)


def state_shardings(state: LearnerState, mesh: Mesh) -> LearnerState:
    """Environments over (data, fsdp); parameters, optimizer and counters replicated: a policy is small."""
    split, whole = batch_sharding(mesh), replicated(mesh)
    batched = {"env", "observation", "episode_return"}
    shardings = {
        name: jax.tree.map(lambda _, place=split if name in batched else whole: place, value)
        for name, value in state._asdict().items()
    }
    shardings["scale"] = state.scale._replace(discounted=split, variance=whole, weight=whole)
    return LearnerState(**shardings)


def frozen_shardings(frozen: Frozen, mesh: Mesh) -> Frozen:
    """The world model as in training, the bank's frames over (data, fsdp), the policy replicated."""
    policy = jax.tree.map(lambda _: replicated(mesh), frozen.policy)
    return Frozen(policy, tree_shardings(frozen.model, mesh), bank_shardings(frozen.bank, mesh))


def jit_run(
    learner: Learner, state: LearnerState, frozen: Frozen, mesh: Mesh, iterations: int, on_nonfinite: str = STOP
) -> jax.stages.Wrapped:
    """`learner.run` over `iterations`, guarded, under `jax.jit`; inputs and outputs are sharded, the state is donated.

    Every metric has a matching `NAME/finite`. If any is 0, nothing from the whole call is kept (`guarded`).
    """
    placed = state_shardings(state, mesh)

    def run(state: LearnerState, frozen: Frozen) -> tuple[LearnerState, Metrics]:
        state, metrics = learner.run(state, frozen, iterations)
        return state, with_flags(metrics)

    return jax.jit(
        on_mesh(guarded(run, on_nonfinite), mesh),
        in_shardings=(placed, frozen_shardings(frozen, mesh)),
        out_shardings=(placed, replicated(mesh)),
        donate_argnums=0,
    )
