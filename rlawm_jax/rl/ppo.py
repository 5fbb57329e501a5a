"""Proximal policy optimisation as pure functions: advantages, loss, and the update with KL-based early stopping.

Shapes: n steps (leading), b environments, m samples of a minibatch, e flattened action.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlawm_jax.rl.exploration import WHITE, Exploration

Metrics = dict[str, Array]


@dataclass(frozen=True)
class PPOSpec:
    """The learner's settings (METHOD.md section 9). Without a critic, it is REINFORCE with a clipped ratio."""

    gamma: float = 0.9
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    target_kl: float = 0.1
    epochs: int = 4
    minibatch: int = 256
    critic: bool = True
    exploration: Exploration = WHITE

    def __post_init__(self) -> None:
        for field in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"config.ppo.{field}: expected a number in [0, 1], found {getattr(self, field)}")
        # advantages are normalised within a minibatch: one has no deviation
        for field, least in (("epochs", 1), ("minibatch", 2)):
            if getattr(self, field) < least:
                raise ValueError(f"config.ppo.{field}: expected {least} or more, found {getattr(self, field)}")
        for field in ("clip", "target_kl"):
            if getattr(self, field) <= 0:
                raise ValueError(f"config.ppo.{field}: expected a positive number, found {getattr(self, field)}")


class Samples(NamedTuple):
    """The samples for a policy update: one row per environment step."""

    observation: Float[Array, "m ..."]
    action: Float[Array, "m e"]  # normalised, as sampled
    log_prob: Float[Array, " m"]  # under the policy that sampled it
    advantage: Float[Array, " m"]
    target: Float[Array, " m"]  # for the critic


# (observation) -> mean [m, e], std [m, e], value [m]
Forward = Callable[[Any, Float[Array, "m ..."]], tuple[Array, Array, Array]]


def gae(
    rewards: Float[Array, "n b"],
    values: Float[Array, "n b"],
    next_values: Float[Array, "n b"],
    terminated: Bool[Array, "n b"],
    truncated: Bool[Array, "n b"],
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Array, "n b"], Float[Array, "n b"]]:
    """(advantages, value targets) by generalised advantage estimation.

    `next_values` are of the state that a step led to, before any reset. A terminated step has no future value; a
    truncated one has its next state's value; neither propagates advantage back across the reset.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    carry_on = gamma * gae_lambda * ~(terminated | truncated)

    def back(advantage: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, weight = inputs
        advantage = delta + weight * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(rewards[0]), (deltas, carry_on), reverse=True)
    return advantages, advantages + values


def returns_to_go(rewards: Float[Array, "n b"], done: Bool[Array, "n b"], gamma: float) -> Float[Array, "n b"]:
    """Discounted rewards to the end of the episode or of the rollout."""
    zero = jnp.zeros_like(rewards)
    return gae(rewards, zero, zero, done, jnp.zeros_like(done), gamma, 1.0)[0]


def leave_one_out(advantages: Float[Array, "n b"], group_size: int) -> Float[Array, "n b"]:
    """Each advantage minus the mean of the others in its group of adjacent environments, which share start and noise.

    What a group shares (the demonstration's difficulty, the effect of the noise) says nothing about an action. The
    others' mean is a baseline independent of the environment's action, so the gradient stays unbiased.
    """
    if group_size == 1:
        return advantages
    grouped = advantages.reshape(len(advantages), -1, group_size)
    others = (grouped.sum(axis=-1, keepdims=True) - grouped) / (group_size - 1)
    return (grouped - others).reshape(advantages.shape)


def log_prob(
    action: Float[Array, "m e"], mean: Float[Array, "m e"], std: Float[Array, "m e"], exploration: Exploration = WHITE
) -> Float[Array, " m"]:
    """Log density of the whole chunk under a Gaussian whose standardised noise `exploration` describes."""
    z = exploration.whiten((action - mean) / std)
    density = -0.5 * (jnp.square(z) + jnp.log(2 * jnp.pi)).sum(axis=-1) - jnp.log(std).sum(axis=-1)
    return density - exploration.log_volume(z.shape[-1])


def entropy(std: Float[Array, "m e"], exploration: Exploration = WHITE) -> Float[Array, " m"]:
    """Entropy of the whole chunk under the same Gaussian."""
    independent = (0.5 * (1 + jnp.log(2 * jnp.pi)) + jnp.log(std)).sum(axis=-1)
    return independent + exploration.log_volume(std.shape[-1])


def ppo_loss(params: Any, forward: Forward, samples: Samples, spec: PPOSpec) -> tuple[Array, Metrics]:
    """The clipped surrogate, half the critic's squared error and the entropy bonus; advantages are normalised here."""
    mean, std, value = forward(params, samples.observation)
    change = log_prob(samples.action, mean, std, spec.exploration) - samples.log_prob
    ratio = jnp.exp(change)
    # within the minibatch and divided by n - 1, as in the release
    advantage = (samples.advantage - samples.advantage.mean()) / (samples.advantage.std(ddof=1) + 1e-8)
    clipped = jnp.clip(ratio, 1 - spec.clip, 1 + spec.clip)
    policy = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    bonus = entropy(std, spec.exploration).mean()
    loss = policy - spec.entropy_coef * bonus
    metrics = {
        "policy_loss": policy,
        "entropy": bonus,
        "kl": (ratio - 1 - change).mean(),  # the k3 estimator: unbiased and never negative
        "clip_fraction": (jnp.abs(ratio - 1) > spec.clip).mean(),
    }
    if spec.critic:
        # not clipped, and halved before `value_coef` halves it again, as in the release
        metrics["value_loss"] = 0.5 * jnp.square(value - samples.target).mean()
        loss += spec.value_coef * metrics["value_loss"]
    return loss, metrics | {"loss": loss}


def update(
    params: Any,
    opt_state: Any,
    samples: Samples,
    key: Array,
    *,
    forward: Forward,
    tx: optax.GradientTransformation,
    spec: PPOSpec,
) -> tuple[Any, Any, Metrics]:
    """Epochs of minibatches over `samples` [m total]. From the first minibatch whose KL exceeds the target, neither
    parameters nor optimizer state change any more.

    Metrics are means over the minibatches that were applied (KL: over all that were evaluated), plus "stopped".
    """
    total = len(samples.advantage)
    if total % spec.minibatch:
        raise ValueError(f"config.ppo.minibatch: expected a divisor of the {total} samples, found {spec.minibatch}")

    def minibatch(carry: tuple, rows: Array) -> tuple[tuple, Metrics]:
        params, opt_state, stopped = carry
        chosen = jax.tree.map(lambda x: x[rows], samples)
        (_, metrics), grads = jax.value_and_grad(ppo_loss, has_aux=True)(params, forward, chosen, spec)
        looked = ~stopped
        stopped = stopped | ~(metrics["kl"] <= spec.target_kl)  # a NaN KL stops as well
        updates, new_opt = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt
        kept = jax.tree.map(lambda n, o: jnp.where(stopped, o, n), new, (params, opt_state))
        metrics |= {"grad_norm": optax.global_norm(grads), "looked": looked, "applied": ~stopped}
        return (*kept, stopped), metrics

    keys = jax.random.split(key, spec.epochs)
    # all epochs in one scan, so that the program does not grow with their number
    rows = jax.vmap(lambda k: jax.random.permutation(k, total))(keys).reshape(-1, spec.minibatch)
    start = (params, opt_state, jnp.zeros((), bool))
    (params, opt_state, stopped), measured = jax.lax.scan(minibatch, start, rows)
    looked, applied = measured.pop("looked"), measured.pop("applied")

    def mean_where(values: Array, where: Array) -> Array:
        return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)

    metrics = {name: mean_where(values, looked if name == "kl" else applied) for name, values in measured.items()}
    return params, opt_state, metrics | {"stopped": stopped.astype(jnp.float32), "updates": applied.sum() * 1.0}
