"""The pathwise learner: the gradient of the imagined return itself, through decoder, policy, flow and reward.

Imagination is one differentiable program, so a policy can follow the derivative of its return instead of estimating it
from the returns of random actions. As in SHAC (arXiv 2204.07137) and PWM (2407.02466), a window of a few chunks is
differentiated, actions are reparameterised (mean + std * noise), and a critic, where there is one, stands for the
return beyond the window; its target is a slow copy. Shapes: n chunks of a window (leading), b environments, f features.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlawm_jax.rl.env import EnvState, select
from rlawm_jax.rl.exploration import WHITE, Exploration
from rlawm_jax.rl.learner import Frozen, Learner, is_critic
from rlawm_jax.rl.ppo import Metrics, gae


@dataclass(frozen=True)
class PathwiseSpec:
    """The learner's settings. Without a critic, what follows a window does not count."""

    gamma: float = 0.99
    gae_lambda: float = 0.95  # of the critic's targets
    critic: bool = True
    critic_updates: int = 16  # per iteration, each on the whole window
    target_decay: float = 0.8  # of the target critic, per iteration
    remat: bool = True  # recompute each chunk for the gradient: memory of one chunk instead of the window's
    exploration: Exploration = WHITE

    def __post_init__(self) -> None:
        for field in ("gamma", "gae_lambda", "target_decay"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"config.pathwise.{field}: expected a number in [0, 1], found {getattr(self, field)}")
        if self.critic_updates < 1:
            raise ValueError(f"config.pathwise.critic_updates: expected 1 or more, found {self.critic_updates}")


class PathwiseState(NamedTuple):
    """The state carried from iteration to iteration."""

    iteration: Int[Array, ""]
    params: nnx.State
    opt_state: tuple[Any, Any]  # of policy and critic
    env: EnvState
    observation: Float[Array, "b s s 3"]
    episode_return: Float[Array, " b"]  # so far, undiscounted
    target: nnx.State  # the trained parameters again, whose critic is the target critic


class Window(NamedTuple):
    """A differentiated window, time first, without its gradient."""

    features: Float[Array, "n b f"]
    next_value: Float[Array, "n b"]  # the target critic's, of the state that the chunk led to
    reward: Float[Array, "n b"]
    distance: Float[Array, "n b"]
    terminated: Bool[Array, "n b"]
    truncated: Bool[Array, "n b"]
    success: Bool[Array, "n b"]
    episode_return: Float[Array, "n b"]  # including this chunk


@dataclass(frozen=True, kw_only=True)
class PathwiseLearner(Learner):
    """Ascends the gradient of the imagined return; `tx` trains the policy, `critic_tx` the critic."""

    pathwise: PathwiseSpec
    critic_tx: optax.GradientTransformation

    section = "pathwise"

    @property
    def exploration(self) -> Exploration:
        """How the noise of a chunk's rows correlates."""
        return self.pathwise.exploration

    def init(self, params: nnx.State, frozen: Frozen) -> PathwiseState:
        """The state before the first iteration: every environment newly reset."""
        model = nnx.merge(self.model, frozen.model)
        env = self.env.reset(model, frozen.bank, self._key("first_reset"), self._worlds)
        return PathwiseState(
            iteration=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=(self.tx.init(params), self.critic_tx.init(params)),
            env=env,
            observation=self.env.observe(model, env),
            episode_return=jnp.zeros(self.num_envs),
            # copied, because the learner's state is donated leaf by leaf
            target=jax.tree.map(jnp.copy, params),
        )

    def iteration(self, state: PathwiseState, frozen: Frozen) -> tuple[PathwiseState, Metrics]:
        """Differentiate a window, step the policy, fit the critic; metrics are float32 scalars."""
        self.on_trace()
        gradient = jax.value_and_grad(self.objective, has_aux=True)
        (objective, (window, after)), grads = gradient(state.params, state, frozen)
        grads = jax.tree.map(jnp.negative, grads)  # optimizers descend
        policy_opt, critic_opt = state.opt_state
        updates, policy_opt = self.tx.update(grads, policy_opt, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"objective": objective, "grad_norm": optax.global_norm(grads)} | _metrics(window)
        target = state.target
        if self.pathwise.critic:
            params, critic_opt, fit = self._fit_critic(params, critic_opt, frozen.policy, window)
            decay = self.pathwise.target_decay
            target = jax.tree.map(lambda slow, new: decay * slow + (1 - decay) * new, target, params)
            metrics |= fit
        state = after._replace(
            iteration=state.iteration + 1, params=params, opt_state=(policy_opt, critic_opt), target=target
        )
        return state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    def objective(
        self, params: nnx.State, state: PathwiseState, frozen: Frozen
    ) -> tuple[Float[Array, ""], tuple[Window, PathwiseState]]:
        """Mean discounted return of the window from `state`, with the target critic's value at its end.

        An episode that terminates inside the window has no value beyond; one that is truncated there has its next
        state's. The environment that follows starts a new sum. Returned beside it: the window, and the state with its
        environments after the window.
        """
        spec, model = self.pathwise, nnx.merge(self.model, frozen.model)
        policy = self._merge(params, frozen.policy)
        # the target critic reads the policy's own features, so that an action can improve what the policy sees next
        slow = jax.tree_util.tree_map_with_path(
            lambda path, new, old: old if is_critic(path) else new, params, state.target
        )
        critic = self._merge(slow, frozen.policy)

        def value_of(tokens: Array, env: EnvState) -> Array:
            if not spec.critic:
                return jnp.zeros(self.num_envs)
            return critic.value(critic.features(self.env.observe(model, env._replace(tokens=tokens))))

        def chunk(carry: tuple, i: Array) -> tuple[tuple, tuple]:
            env, observation, so_far, weight = carry
            features = policy.features(observation)
            mean, std = policy.distribution(features)
            white = self._normal("action", state.iteration, i, mean.shape[-1])
            action = mean + std * spec.exploration.colour(white)
            noise = self._key("flow_noise", state.iteration, i)
            after, outcome = self.env.step(model, frozen.bank, env, self._raw(policy, action), noise, self._worlds)
            fresh = self.env.reset(model, frozen.bank, self._key("reset", state.iteration, i), self._worlds)
            value = value_of(after.tokens, env)
            ends = outcome.truncated | ((i == self.num_steps - 1) & ~outcome.terminated)
            gain = weight * (outcome.reward + spec.gamma * jnp.where(ends, value, 0.0))
            total = so_far + outcome.reward
            row = Window(
                features,
                value,
                outcome.reward,
                outcome.distance,
                outcome.terminated,
                outcome.truncated,
                outcome.success,
                total,
            )
            env = select(outcome.done, fresh, after)
            carry = (
                env,
                self.env.observe(model, env),
                jnp.where(outcome.done, 0.0, total),
                jnp.where(outcome.done, 1.0, spec.gamma * weight),
            )
            return carry, (gain, jax.lax.stop_gradient(row))

        chunk = jax.checkpoint(chunk, prevent_cse=False) if spec.remat else chunk
        start = (state.env, state.observation, state.episode_return, jnp.ones(self.num_envs))
        carry, (gains, window) = jax.lax.scan(chunk, start, jnp.arange(self.num_steps))
        env, observation, so_far, _ = jax.lax.stop_gradient(carry)
        after = state._replace(env=env, observation=observation, episode_return=so_far)
        return gains.sum(axis=0).mean(), (window, after)

    def _fit_critic(
        self, params: nnx.State, opt_state: Any, rest: nnx.State, window: Window
    ) -> tuple[nnx.State, Any, Metrics]:
        """Regress the critic on lambda-returns of the window, on the features that the policy had."""
        spec = self.pathwise
        values = self._merge(params, rest).value(window.features.reshape(-1, window.features.shape[-1]))
        values = values.reshape(window.reward.shape)
        ends = window.terminated, window.truncated
        _, targets = gae(window.reward, values, window.next_value, *ends, spec.gamma, spec.gae_lambda)

        def loss(params: nnx.State) -> Array:
            flat = window.features.reshape(-1, window.features.shape[-1])
            return 0.5 * jnp.square(self._merge(params, rest).value(flat) - targets.reshape(-1)).mean()

        def step(carry: tuple, _: None) -> tuple[tuple, Array]:
            params, opt_state = carry
            error, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = self.critic_tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), error

        (params, opt_state), errors = jax.lax.scan(step, (params, opt_state), length=spec.critic_updates)
        unexplained = jnp.var(targets - values) / jnp.maximum(jnp.var(targets), 1e-8)
        return params, opt_state, {"value_loss": errors[-1], "explained_variance": 1 - unexplained}


def _metrics(window: Window) -> Metrics:
    done = window.terminated | window.truncated
    finished = jnp.maximum(done.sum(), 1)
    return {
        "reward": window.reward.mean(),
        "distance": window.distance.mean(),
        "episodes": done.sum(),
        "episode_return": (window.episode_return * done).sum() / finished,
        "success": (window.success & done).sum() / finished,
        "truncated": window.truncated.sum() / finished,
    }
