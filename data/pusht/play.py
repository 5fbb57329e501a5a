"""Record the play traces: pushes from all sides at varied speeds, with some free motion and no goal.

python -m data.pusht.play --episodes=240 --frames=60 --seed=0
"""

import numpy as np
from absl import app, flags
from jaxtyping import Float
from tqdm import tqdm

from data.pusht import motion, traces
from data.pusht.sim import PushT, rotation

START_CENTRES = (130.0, 382.0)
# Of this many random states, the episode begins in the one whose agent is nearest to the block.
START_CHOICES = 3
KEEP_IN = (115.0, 397.0)
FREE_MOTION = 0.06
PUSH_ON = 0.85
CHOICES = 4
# A push that has lost contact with the block for this many steps is abandoned.
LOST = 2


def _stays(block: Float[np.ndarray, "3"], travel: Float[np.ndarray, "2"]) -> bool:
    """Whether a push by about this much leaves the block inside the workspace."""
    end = motion.centre(block) + 0.8 * travel
    return bool(((end > KEEP_IN[0]) & (end < KEEP_IN[1])).all())


def _random_push(rng: np.random.Generator, target: Float[np.ndarray, "2"], tee: motion.Tee) -> motion.Points | None:
    """A push that should leave the block inside the workspace: of a few random ones, the one that starts nearest."""
    paths: list[motion.Points] = []
    for _ in range(100):
        push = motion.Push(rng.uniform(), rng.normal(0, 0.4), rng.uniform(60, 220), rng.normal(0, 0.6))
        path = motion.push_path(push, tee)
        if path is not None and _stays(tee.pose, path[-1] - path[1]):
            paths.append(path)
        if len(paths) == CHOICES:
            break
    return min(paths, key=lambda path: np.linalg.norm(path[0] - target), default=None)


def _next_targets(
    rng: np.random.Generator, target: Float[np.ndarray, "2"], block: Float[np.ndarray, "3"], touching: bool
) -> motion.Points:
    """The next motion: keep pushing in a new direction, move round to a new stand-off and push, or just move."""
    if touching and rng.uniform() < PUSH_ON:
        inwards = motion.centre(block) - target
        travel = rotation(rng.normal(0, 0.7)) @ inwards / np.linalg.norm(inwards) * rng.uniform(60, 180)
        if _stays(block, travel) and motion.in_reach(target + travel):
            return motion.timed(np.stack([target, target + travel]), rng.uniform(5, 16))
    tee = motion.Tee(block)
    path = _random_push(rng, target, tee)
    if path is None or rng.uniform() < FREE_MOTION:
        return motion.timed(motion.way_around(target, rng.uniform(40, 472, 2), tee), rng.uniform(12, 30))
    push_speed = rng.uniform(5, 16)
    way = np.concatenate([motion.way_around(target, path[0], tee), path[1:2]])
    approach = motion.timed(way, rng.uniform(24, 40), push_speed)
    return np.concatenate([approach, motion.timed(path[1:], push_speed, push_speed)])


def has_moved(before: Float[np.ndarray, "3"], after: Float[np.ndarray, "3"]) -> bool:
    """Whether the block moved by more than half a pixel or 0.01 rad."""
    return bool((np.abs(after - before) > (0.5, 0.5, 0.01)).any())


def record(rng: np.random.Generator, sim: PushT, num_frames: int) -> tuple[traces.Trace, float]:
    """One play episode, and the share of its steps in which the block moved."""
    starts = [motion.random_start(rng, *START_CENTRES) for _ in range(START_CHOICES)]
    start = min(starts, key=lambda state: np.linalg.norm(state[:2] - motion.centre(state[2:])))
    sim.reset(start)
    target, wobble, queue = start[:2], np.zeros(2), np.empty((0, 2))
    actions, moved, still, leaving = [], 0, -np.inf, False
    for step in range(num_frames):
        if len(queue) == 0 or leaving or still >= LOST:
            queue, still = _next_targets(rng, target, sim.block, still == 0), -np.inf
        target, queue = queue[0], queue[1:]
        wobble = 0.8 * wobble + rng.normal(0, 0.8, 2)
        actions.append(traces.quantise(np.clip(target + wobble, *motion.REACH)))
        if step == num_frames - 1:
            break
        before = sim.block
        sim.step(actions[-1])
        pushed = has_moved(before, sim.block)
        moved += pushed
        still = 0 if pushed else still + 1
        eccentricity = [np.abs(motion.centre(block) - 256).max() for block in (before, sim.block)]
        leaving = eccentricity[1] > max(eccentricity[0], KEEP_IN[1] - 256 + 15)
    return traces.Trace(start, np.stack(actions), sim.block, sim.coverage()), moved / (num_frames - 1)


def main(_: list[str]) -> None:
    """Record all episodes and write the trace file."""
    sim = PushT()
    recorded, shares = [], []
    for episode in tqdm(range(flags.FLAGS.episodes), unit="episode"):
        trace, share = record(np.random.default_rng([flags.FLAGS.seed, episode]), sim, flags.FLAGS.frames)
        recorded.append(trace)
        shares.append(share)
    path = traces.FOLDER / "play.npz"
    path.parent.mkdir(exist_ok=True)
    traces.save(path, recorded)
    print(f"{path}: {len(recorded)} episodes, the block moves in {np.mean(shares):.0%} of the steps")


if __name__ == "__main__":
    flags.DEFINE_integer("episodes", 240, "Number of episodes.")
    flags.DEFINE_integer("frames", 60, "Frames per episode.")
    flags.DEFINE_integer("seed", 0, "Seed of the whole recording.")
    app.run(main)
