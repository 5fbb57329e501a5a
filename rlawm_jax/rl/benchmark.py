"""Imagined chunks per second: the compiled rollout against the same steps driven from Python, side by side."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from rlawm_jax import markdown
from rlawm_jax.rl.setup import RLRun
from rlawm_jax.rng import stream


@dataclass(frozen=True)
class Throughput:
    """Chunks per second at a batch size, medians over the repetitions; `ratio` is the median of paired ratios."""

    batch: int
    compiled: float
    stepwise: float
    ratio: float


def measure(run: RLRun, batches: Sequence[int], repeats: int = 5) -> list[Throughput]:
    """Time whole episodes of the policy's mean actions, alternating both ways; the first, compiling run is not timed.

    Driven from Python, each step is three compiled calls (observe, decide, imagine) with images, actions and rewards
    passing through the host, as with a learner that runs outside the device.
    """
    return [_measure(run, batch, repeats) for batch in batches]


def _measure(run: RLRun, batch: int, repeats: int) -> Throughput:
    episode = jnp.arange(batch, dtype=jnp.int32) % len(run.frozen.bank.length)
    key = stream(jax.random.key(run.config.seed), "throughput")
    ways = [_compiled(run, episode, key), partial(_stepwise, run, _steps(run), episode, key)]
    returns = [way() for way in ways]
    # both programs compute the same returns
    np.testing.assert_allclose(*returns, rtol=1e-3)
    seconds = np.empty((repeats, len(ways)))
    for i in range(repeats):
        for j, way in enumerate(ways):
            clock = time.perf_counter()
            way()
            seconds[i, j] = time.perf_counter() - clock
    chunks = batch * run.learner.env.spec.max_chunks
    compiled, stepwise = chunks / np.median(seconds, axis=0)
    return Throughput(batch, float(compiled), float(stepwise), float(np.median(seconds[:, 1] / seconds[:, 0])))


def _compiled(run: RLRun, episode: Array, key: Array) -> Callable[[], np.ndarray]:
    returns = jax.jit(run.learner.returns)
    frame = jnp.zeros_like(episode)
    return lambda: np.asarray(returns(run.state.params, run.frozen, episode, frame, key)["return"])


@dataclass(frozen=True)
class Steps:
    """The parts of a step, each compiled separately."""

    start: Callable
    look: Callable
    decide: Callable
    imagine: Callable


def _steps(run: RLRun) -> Steps:
    learner, env = run.learner, run.learner.env
    merge = partial(nnx.merge, learner.model)

    def decide(params: nnx.State, rest: nnx.State, images: Array) -> Array:
        policy = nnx.merge(learner.policy, params, rest)
        mean, _ = policy.distribution(policy.features(images))
        return policy.raw_actions(mean.reshape(len(mean), env.spec.chunk, -1))

    return Steps(
        start=jax.jit(lambda weights, *where: env.at(merge(weights), *where)),
        look=jax.jit(lambda weights, state: env.observe(merge(weights), state)),
        decide=jax.jit(decide),
        imagine=jax.jit(lambda weights, *step: env.step(merge(weights), *step)),
    )


def _stepwise(run: RLRun, steps: Steps, episode: Array, key: Array) -> np.ndarray:
    frozen, ids = run.frozen, jnp.arange(len(episode), dtype=jnp.uint32)
    state = steps.start(frozen.model, frozen.bank, episode, jnp.zeros_like(episode))
    total, over = np.zeros(len(episode), np.float32), np.zeros(len(episode), bool)
    for i in range(run.learner.env.spec.max_chunks):
        images = np.asarray(steps.look(frozen.model, state))
        actions = np.asarray(steps.decide(run.state.params, frozen.policy, images))
        noise = stream(key, "evaluation_noise", i)
        state, outcome = steps.imagine(frozen.model, frozen.bank, state, actions, noise, ids)
        total += np.where(over, 0.0, np.asarray(outcome.reward))
        over |= np.asarray(outcome.done)
    return total


def format_markdown(measured: Sequence[Throughput]) -> str:
    """A table with one line per batch size."""
    rows = [(f"{one.batch}", f"{one.compiled:.1f}", f"{one.stepwise:.1f}", f"{one.ratio:.2f}") for one in measured]
    return markdown.table(("batch", "compiled, chunks/s", "driven from Python, chunks/s", "ratio"), rows)
