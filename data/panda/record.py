"""Record the traces: play without a goal, and demonstrations of the tasks by scripted experts.

python -m data.panda.record play --episodes=260
python -m data.panda.record push --episodes=170
"""

import sys
from collections.abc import Iterator

import numpy as np
from absl import app, flags
from tqdm import tqdm

from data.panda import motion, traces
from data.panda.sim import World
from data.panda.tasks import TASKS, start

FREE_MOTION = 0.2  # share of play's motions that do not push
CHOICES = 4
WOBBLE, MEMORY = 0.08, 0.8  # of the noise on every action
REST = 3  # steps after success, so that a clone learns to stop
SPEEDS = 0.4, 0.7
LONGEST = {"touch": 40, "push": 75, "mark": 75}  # steps in which an expert must succeed


def play(rng: np.random.Generator, world: World) -> Iterator[np.ndarray]:
    """Pushes from all sides at varied speeds, and some free motion, without end."""
    while True:
        speed, travel = rng.uniform(0.3, 0.7), rng.uniform(0.5, 0.9)
        if rng.uniform() < FREE_MOTION:
            yield from motion.go(world, rng.uniform([-0.22, -0.22, 0.1], [0.16, 0.22, 0.24]), travel)
            continue
        direction, length = _push_that_stays(rng, world)
        yield from motion.push(world, direction, length, speed, travel)


def _push_that_stays(rng: np.random.Generator, world: World) -> tuple[float, float]:
    """Of a few random pushes that leave the cube in view, the one that begins nearest to the gripper."""
    best, shortest = (0.0, 0.0), np.inf
    tried = 0
    while tried < CHOICES:
        direction, length = rng.uniform(-np.pi, np.pi), rng.uniform(0.05, 0.18)
        along = np.array([np.cos(direction), np.sin(direction)])
        end = world.cube[:2] + length * along
        far_out = np.abs(world.cube[:2] - (motion.CUBE_LOW + motion.CUBE_HIGH) / 2).max() > 0.2
        if not far_out and not ((end > motion.CUBE_LOW) & (end < motion.CUBE_HIGH)).all():
            continue
        tried += 1
        way = float(np.linalg.norm(world.cube[:2] - motion.STAND_OFF * along - world.gripper[:2]))
        if way < shortest:
            best, shortest = (direction, length), way
    return best


def perturbed(rng: np.random.Generator, actions: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The actions with a little slowly varying noise, as a trace file can hold them."""
    noise = np.zeros(3)
    for action in actions:
        noise = MEMORY * noise + rng.normal(0, WOBBLE, 3)
        yield traces.quantise(action + noise)


def record_play(rng: np.random.Generator, world: World, frames: int) -> tuple[traces.Trace, float]:
    """One play episode, and the share of its steps in which the cube moved."""
    begin = start(rng)
    world.reset(begin)
    actions, moved = [], 0
    for action in perturbed(rng, play(rng, world)):
        actions.append(action)
        if len(actions) == frames:
            break
        before = world.cube
        world.step(action)
        moved += bool(np.linalg.norm(world.cube - before) > 1e-3)
    return traces.Trace(begin, np.stack(actions), world.state, success=False), moved / (frames - 1)


def record_demonstration(rng: np.random.Generator, world: World, name: str) -> traces.Trace | None:
    """One demonstration of a task, or None if the expert fails or touches nothing in time."""
    task = TASKS[name]
    begin = start(rng, task)
    world.reset(begin)
    actions: list[np.ndarray] = []
    for action in perturbed(rng, task.expert(world, rng.uniform(*SPEEDS))):
        if len(actions) == LONGEST[name]:
            return None
        actions.append(action)
        world.step(action)
        if task.distance(world) < task.success_within:
            break
    if task.distance(world) >= task.success_within:
        return None
    for _ in range(REST):
        actions.append(np.zeros(3, np.float32))
        world.step(actions[-1])
    if task.distance(world) >= task.success_within:
        return None
    return traces.Trace(begin, np.stack([*actions, actions[-1]]), world.state, success=True)


def main(argv: list[str]) -> None:
    """Record one split and write its trace file."""
    names = ["play", *TASKS]
    if len(argv) != 2 or argv[1] not in names:
        sys.exit(f"data.panda.record: expected one of {', '.join(names)}, found {' '.join(argv[1:]) or 'nothing'}")
    name, world = argv[1], World()
    recorded, shares, failed = [], [], 0
    with tqdm(total=flags.FLAGS.episodes, unit="episode") as progress:
        while len(recorded) < flags.FLAGS.episodes:
            rng = np.random.default_rng([flags.FLAGS.seed, names.index(name), len(recorded) + failed])
            if name == "play":
                trace, share = record_play(rng, world, flags.FLAGS.frames)
                shares.append(share)
            else:
                trace = record_demonstration(rng, world, name)
            if trace is None:
                failed += 1
                continue
            recorded.append(trace)
            progress.update()
    path = traces.FOLDER / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    traces.save(path, recorded)
    lengths = [len(trace.actions) for trace in recorded]
    print(f"{path}: {len(recorded)} episodes of {np.mean(lengths):.0f} frames ({min(lengths)} to {max(lengths)})")
    print(f"the cube moves in {np.mean(shares):.0%} of the steps" if shares else f"{failed} starts left out")


if __name__ == "__main__":
    flags.DEFINE_integer("episodes", 260, "Number of episodes.")
    flags.DEFINE_integer("frames", 48, "Frames of a play episode.")
    flags.DEFINE_integer("seed", 0, "Seed of the whole recording.")
    app.run(main)
