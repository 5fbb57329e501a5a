"""Find demonstrations that solve Push-T: two-push look-ahead by the cross-entropy method over re-simulated pushes.

    python -m data.pusht.plan --episodes=150 --workers=2

Before every push the planner tries random pushes in a quick copy of the simulator, refines the best ones, tries further
pushes after each of those, and executes the first push of the best pair in the recorded simulator; then it plans again.
An episode ends when the coverage exceeds gym-pusht's threshold, plus a few steps of rest.

Start poses: block centre of gravity uniform in [120, 392]^2 pixels, any block angle, agent uniform in [30, 482]^2 clear
of the block. An unsolved start is replaced by another one; the script reports how many.

The committed file: 150 demonstrations, all ending at coverage above 0.95, 80 frames on average (humans: about 125), at
most 138; 4 of the 154 starts were abandoned.
"""

import dataclasses
import functools
import multiprocessing

import numpy as np
from absl import app, flags
from jaxtyping import Float
from tqdm import tqdm

from data.pusht import motion, traces
from data.pusht.rehearsal import Rehearsal, coverage
from data.pusht.sim import GOAL, PushT, to_world

START_CENTRES = (120.0, 392.0)
DONE_COVERAGE = 0.95
MAX_STEPS = 150
REST = 3
ATTEMPTS = 6

TRAVEL_SPEED, PUSH_SPEED = 24.0, 10.0
FIRST, SECOND = 128, 48
# Steps added to the cost of every push, so that one good push beats two mediocre ones.
PUSH_OVERHEAD = 6
# A push must leave at most this share of the distance to the goal, or the planner would postpone the good push forever;
# if no push achieves that, a push may increase the distance, but must move the block by CHANGE of the distance.
PROGRESS = (0.85, 1.5)
CHANGE = 0.15
MAX_DETOURS = 2
KEPT, ROUNDS = 6, 3
# Standard deviations of a push's where, angle, length, turn when it is refined; they halve every round.
SPREAD = np.array([0.02, 0.15, 15.0, 0.2])
WORKSPACE = (75.0, 437.0)

GOAL_OUTLINE = to_world(GOAL, motion.OUTLINE)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """A push tried from some state: its targets, and the resulting agent and block; costs are in steps."""

    push: motion.Push
    targets: motion.Points
    agent: Float[np.ndarray, "2"]
    block: Float[np.ndarray, "3"]
    steps: int
    distance: float
    to_go: float

    @property
    def cost(self) -> float:
        """Steps spent plus the estimated steps left."""
        return self.steps + self.to_go


def distance(block: Float[np.ndarray, "3"], corners: motion.Points = GOAL_OUTLINE) -> float:
    """Mean distance in pixels between the corners of the block and other corners, by default those of the goal."""
    return float(np.linalg.norm(to_world(block, motion.OUTLINE) - corners, axis=1).mean())


def steps_to_go(block: Float[np.ndarray, "3"]) -> float:
    """An estimate of the steps left: 0 when done, else growing with the distance and its logarithm."""
    off = distance(block)
    if off < 6.0 and coverage(block) > DONE_COVERAGE:
        return 0.0
    return 15.0 + 0.3 * off + 6.0 * np.log2(1.0 + off / 2.0)


def random_push(rng: np.random.Generator, off: float) -> motion.Push:
    """A push anywhere on the outline, with a length suited to the distance left."""
    length = rng.uniform(5, 30 + min(1.5 * off, 170))
    return motion.Push(rng.uniform(), rng.normal(0, 0.35), length, rng.normal(0, 0.5))


def refined(rng: np.random.Generator, push: motion.Push, scale: float) -> motion.Push:
    """A push a little different from the given one."""
    where, angle, length, turn = dataclasses.astuple(push) + rng.normal(0, 1, 4) * SPREAD * scale
    return motion.Push(where % 1.0, angle, max(length, 3.0), turn)


def attempt(sim: Rehearsal, push: motion.Push, agent: Float[np.ndarray, "2"], tee: motion.Tee) -> Outcome | None:
    """What a push does to the block; None if it cannot be executed or drives the block out of the workspace."""
    path = motion.push_path(push, tee)
    if path is None:
        return None
    way = motion.timed(motion.way_around(agent, path[0], tee), TRAVEL_SPEED, PUSH_SPEED)
    stroke = motion.timed(path, PUSH_SPEED)
    targets = traces.quantise(np.concatenate([way, stroke, stroke[-1:]]))
    agent, block = sim.carry_out(agent, tee, targets)
    middle = motion.centre(block)
    if not ((middle > WORKSPACE[0]) & (middle < WORKSPACE[1])).all():
        return None
    return Outcome(push, targets, agent, block, len(targets) + PUSH_OVERHEAD, distance(block), steps_to_go(block))


def search(
    rng: np.random.Generator,
    sim: Rehearsal,
    agent: Float[np.ndarray, "2"],
    block: Float[np.ndarray, "3"],
    *,
    samples: int,
    rounds: int,
    progress: float,
) -> list[Outcome]:
    """The best few pushes from a state that bring the block nearer: random ones, then refinements of the best."""
    off, tee, corners = distance(block), motion.Tee(block), to_world(block, motion.OUTLINE)
    best: list[Outcome] = []
    pushes = [random_push(rng, off) for _ in range(samples)]
    for round_index in range(rounds + 1):
        tried = [attempt(sim, push, agent, tee) for push in pushes]
        useful = [
            outcome
            for outcome in tried
            if outcome is not None
            and outcome.distance < progress * off
            and distance(outcome.block, corners) > CHANGE * off
        ]
        best = sorted([*best, *useful], key=lambda outcome: outcome.cost)[:KEPT]
        pushes = [refined(rng, outcome.push, 0.5**round_index) for outcome in best for _ in range(samples // 16)]
    return best


def next_push(rng: np.random.Generator, sim: Rehearsal, recorded: PushT) -> Outcome | None:
    """The first push of the best pair of pushes from the recorded simulator's state."""
    firsts: list[Outcome] = []
    for progress in PROGRESS:
        here = recorded.agent, recorded.block
        firsts = firsts or search(rng, sim, *here, samples=FIRST, rounds=ROUNDS, progress=progress)
    best, best_cost = None, np.inf
    for first in firsts:
        cost = first.cost
        if first.to_go > 0:
            there = first.agent, first.block
            seconds = search(rng, sim, *there, samples=SECOND, rounds=1, progress=PROGRESS[0])
            cost = min([first.cost, *(first.steps + second.cost for second in seconds)])
        if cost < best_cost:
            best, best_cost = first, cost
    return best


def solve(
    rng: np.random.Generator, sim: Rehearsal, recorded: PushT, start: Float[np.ndarray, "5"]
) -> traces.Trace | None:
    """One demonstration from a start state, or None if the planner does not solve it in time."""
    recorded.reset(start)
    actions: list[np.ndarray] = []
    detours = 0

    def carry_out(target: Float[np.ndarray, "2"]) -> None:
        actions.append(traces.quantise(target))
        recorded.step(actions[-1])

    while recorded.coverage() <= DONE_COVERAGE:
        outcome = next_push(rng, sim, recorded)
        if outcome is None or len(actions) + len(outcome.targets) > MAX_STEPS:
            return None
        detours += outcome.distance > PROGRESS[0] * distance(recorded.block)
        if detours > MAX_DETOURS:
            return None
        for target in outcome.targets:
            carry_out(target)
            if recorded.coverage() > DONE_COVERAGE:
                break
    stop = recorded.agent
    for _ in range(REST):
        carry_out(stop)
    if recorded.coverage() <= DONE_COVERAGE:
        return None
    return traces.Trace(start, np.stack([*actions, actions[-1]]), recorded.block, recorded.coverage())


def demonstrate(episode: int, seed: int) -> tuple[traces.Trace, int]:
    """The demonstration number `episode`, and how many starts were abandoned before it."""
    sim, recorded = Rehearsal(), PushT()
    given_up = 0
    while True:
        rng = np.random.default_rng([seed, episode, given_up])
        start = motion.random_start(rng, *START_CENTRES)
        for _ in range(ATTEMPTS):
            trace = solve(rng, sim, recorded, start)
            if trace is not None:
                return trace, given_up
        given_up += 1


def main(_: list[str]) -> None:
    """Record demonstrations, saving along the way; a second run resumes where the first one stopped."""
    path = traces.FOLDER / "demo.npz"
    recorded = traces.load(path)[0] if path.exists() else []
    episodes = range(len(recorded), flags.FLAGS.episodes)
    given_up = 0
    with multiprocessing.Pool(flags.FLAGS.workers) as pool:
        work = pool.imap(functools.partial(demonstrate, seed=flags.FLAGS.seed), episodes)
        for trace, skipped in tqdm(work, total=len(episodes), unit="demo"):
            recorded.append(trace)
            given_up += skipped
            traces.save(path, recorded)
    lengths = np.array([len(trace.actions) for trace in recorded])
    worst = min(trace.coverage for trace in recorded)
    print(
        f"{path}: {len(recorded)} demonstrations, {lengths.mean():.0f} frames on average, at most {lengths.max()}; "
        f"coverage at least {worst:.3f}; {given_up} starts abandoned in this run"
    )


if __name__ == "__main__":
    flags.DEFINE_integer("episodes", 150, "Number of demonstrations in the file.")
    flags.DEFINE_integer("workers", 2, "Processes.")
    flags.DEFINE_integer("seed", 0, "Seed of the whole recording.")
    app.run(main)
