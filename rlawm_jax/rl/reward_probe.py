"""Before blaming PPO: can the imagined reward tell good actions from bad ones, and what obscures the difference?

Everything is measured inside the world model, from the first frames of demonstrations, with the same noise for every
row of a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlawm_jax import markdown
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate
from rlawm_jax.rl.demonstrations import Bank, Demonstrations, lookup
from rlawm_jax.rl.env import distance
from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.loop import SPLITS
from rlawm_jax.rl.setup import RLRun, evaluation_starts
from rlawm_jax.rng import stream

RECORDED, CLONED, ANOTHERS, STILL, KEPT = (
    "the demonstration's own actions",
    "the cloned policy",
    "another demonstration's actions",
    "holding still",
    "no prediction: the first frame kept",
)
ACTIONS, NOISE, STARTS = "the policy's own exploration, white", "the flow's noise", "the demonstration"
SMOOTH = 0.9  # correlation of rows that is shown beside white noise where the config has none
SEED = 2026


@dataclass(frozen=True)
class Probe:
    """The results on one split of the demonstrations.

    returns: mean imagined return of each way to act; differences: paired, against the cloned policy; deviations:
    standard deviation of the first chunk's reward by source.
    """

    returns: dict[str, Estimate]
    differences: dict[str, Estimate]
    deviations: dict[str, float]


def probe(run: RLRun, draws: int = 8) -> dict[str, Probe]:
    """A `Probe` for each of "training" and "held-out"; `draws` of actions and of noise from every start."""
    banks = run.frozen.bank, run.held_out
    return {
        name: _probe(run, bank, recorded, draws)
        for name, bank, recorded in zip(SPLITS, banks, run.recorded, strict=True)
    }


def _probe(run: RLRun, bank: Bank, recorded: Demonstrations, draws: int) -> Probe:
    episode, frame = evaluation_starts(bank, run.config.eval.episodes)
    frozen, key = run.frozen._replace(bank=bank), stream(jax.random.key(run.config.eval.seed), "probe")
    spec = run.learner.env.spec
    own = recorded_chunks(recorded, np.asarray(episode), spec.chunk, spec.max_chunks)
    play = jax.jit(run.learner.returns_of_actions)
    returns = {
        RECORDED: play(own, frozen, episode, frame, key)["return"],
        CLONED: jax.jit(run.learner.returns)(run.state.params, frozen, episode, frame, key)["return"],
        ANOTHERS: play(np.roll(own, 1, axis=1), frozen, episode, frame, key)["return"],
    }
    known = recorded.still or [None] * len(recorded.lengths)
    rows = [row for e in np.asarray(episode) if (row := known[e]) is not None]
    if len(rows) == len(episode):  # the dataset says how
        still = np.broadcast_to(np.stack(rows)[None, :, None], own.shape)
        returns[STILL] = play(still, frozen, episode, frame, key)["return"]
    returns[KEPT] = _kept(run, bank, episode)
    scores = {name: np.asarray(values, np.float64) for name, values in returns.items()}
    bootstrap = ClusterBootstrap(np.asarray(episode), seed=SEED)
    return Probe(
        returns=_means(bootstrap, scores),
        differences=_means(bootstrap, {name: v - scores[CLONED] for name, v in scores.items() if name != CLONED}),
        deviations=_deviations(run, bank, episode, frame, key, draws),
    )


def _means(bootstrap: ClusterBootstrap, values: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    return {name: mean for name, v in values.items() if (mean := bootstrap.mean(v)) is not None}


def recorded_chunks(
    recorded: Demonstrations, episodes: np.ndarray, chunk: int, count: int
) -> Float[np.ndarray, "n b k a"]:
    """The first `count` chunks of raw actions of each demonstration; its last row is repeated beyond its end."""
    wanted = np.arange(count * chunk)
    rows = [recorded.actions[e][np.minimum(wanted, len(recorded.actions[e]) - 1)] for e in episodes]
    stacked = np.stack(rows).astype(np.float32)
    return stacked.reshape(len(episodes), count, chunk, -1).swapaxes(0, 1)


def _kept(run: RLRun, bank: Bank, episode: Int[Array, " b"]) -> np.ndarray:
    """Returns if every prediction equalled the first frame."""
    spec, model = run.learner.env.spec, run.model()
    first, last = lookup(bank, model, episode, jnp.zeros_like(episode)), bank.length[episode] - 1
    total = np.zeros(len(episode))
    for i in range(spec.max_chunks):
        frame = jnp.minimum((i + 1) * spec.chunk, last)
        target = lookup(bank, model, episode, last if spec.target == "goal" else frame)
        alive = np.asarray(i * spec.chunk < last)
        total -= alive * spec.reward_scale * np.asarray(distance(first, target, spec.metric))
    return total


def _deviations(
    run: RLRun, bank: Bank, episode: Int[Array, " b"], frame: Int[Array, " b"], key: Array, draws: int
) -> dict[str, float]:
    env, model, policy = run.learner.env, run.model(), run.policy()
    start = env.at(model, bank, episode, frame)
    mean, std = policy.distribution(policy.features(env.observe(model, start)))
    ids = jnp.arange(len(episode), dtype=jnp.uint32)

    @jax.jit
    def rewards(noise: Array, draw: Array) -> Array:
        actions = policy.raw_actions((mean + std * noise).reshape(len(mean), env.spec.chunk, -1))
        return env.step(model, bank, start, actions, stream(key, "noise", draw), ids)[1].reward

    def scores(exploration: Exploration) -> np.ndarray:
        white = (jax.random.normal(stream(key, "actions", i), mean.shape) for i in range(draws))
        return np.stack([rewards(exploration.colour(noise), jnp.uint32(0)) for noise in white])

    def within(rewards: np.ndarray) -> float:
        return float(np.sqrt(rewards.var(axis=0, ddof=1).mean()))

    by_noise = np.stack([rewards(jnp.zeros_like(mean), jnp.uint32(i)) for i in range(draws)])
    smooth = Exploration(env.spec.chunk, run.learner.exploration.correlation or SMOOTH)
    return {
        ACTIONS: within(scores(Exploration(env.spec.chunk))),
        smooth_label(smooth): within(scores(smooth)),
        NOISE: within(by_noise),
        STARTS: float(by_noise.mean(axis=0).std(ddof=1)),
    }


def smooth_label(exploration: Exploration) -> str:
    """The row of the exploration whose noise correlates from row to row."""
    return f"the policy's own exploration, rows correlated by {exploration.correlation:g}"


def format_markdown(probes: Mapping[str, Probe]) -> str:
    """Two tables: returns with paired differences, and the sources of variation in the first reward."""
    first = next(iter(probes.values()))
    returns = []
    for row in dict.fromkeys(name for one in probes.values() for name in one.returns):
        cells = [row]
        for one in probes.values():
            difference = one.differences.get(row)
            cells += [format_estimate(one.returns.get(row), 3), format_estimate(difference, 3) if difference else ""]
        returns.append(cells)
    heads = [head for name in probes for head in (name, "minus the clone, paired")]
    deviations = [[row, *(f"{one.deviations[row]:.4f}" for one in probes.values())] for row in first.deviations]
    return "\n\n".join(
        [
            markdown.table(["imagined return of", *heads], returns),
            markdown.table(["standard deviation of the first reward with", *probes], deviations),
        ]
    )
