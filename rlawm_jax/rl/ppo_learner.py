"""The PPO learner: rollout in imagination, reward, advantages and PPO epochs as one pure function.

Shapes: n steps of a rollout (leading), b environments, s pixels, k rows of a chunk, a action, e = k a.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlawm_jax.rl.env import EnvState, StepOutcome, select
from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.learner import Frozen, Learner
from rlawm_jax.rl.ppo import Metrics, PPOSpec, Samples, gae, leave_one_out, log_prob, returns_to_go, update

RETURN_DECAY = 0.99  # of the running variance used for reward normalisation


class ReturnScale(NamedTuple):
    """Running variance of the discounted return, used to divide rewards where the config enables it."""

    discounted: Float[Array, " b"]
    variance: Float[Array, ""]
    weight: Float[Array, ""]  # how much of `variance` is filled


class PPOState(NamedTuple):
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


@dataclass(frozen=True, kw_only=True)
class PPOLearner(Learner):
    """PPO, or REINFORCE without a critic, in imagination."""

    ppo: PPOSpec
    normalise_rewards: bool = False

    section = "ppo"

    @property
    def exploration(self) -> Exploration:
        """How the noise of a chunk's rows correlates."""
        return self.ppo.exploration

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.num_envs * self.num_steps
        if total % self.ppo.minibatch:
            raise ValueError(
                f"config.ppo.minibatch: expected a divisor of num_envs x num_steps = {self.num_envs} x "
                f"{self.num_steps} = {total}, found {self.ppo.minibatch}"
            )

    def init(self, params: nnx.State, frozen: Frozen) -> PPOState:
        """The state before the first iteration: every environment newly reset."""
        model = nnx.merge(self.model, frozen.model)
        env = self.env.reset(model, frozen.bank, self._key("first_reset"), self._worlds)
        return PPOState(
            iteration=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.tx.init(params),
            env=env,
            observation=self.env.observe(model, env),
            episode_return=jnp.zeros(self.num_envs),
            scale=ReturnScale(jnp.zeros(self.num_envs), jnp.zeros(()), jnp.zeros(())),
        )

    def iteration(self, state: PPOState, frozen: Frozen) -> tuple[PPOState, Metrics]:
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

    def _rollout(self, state: PPOState, frozen: Frozen) -> tuple[PPOState, Rollout]:
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
        # the value loss must not change the policy's features through the low-rank branches
        return *policy.distribution(features), policy.value(jax.lax.stop_gradient(features))

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
