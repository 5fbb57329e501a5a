"""Plan to goal frames and judge it in the true simulator: python -m launch.plan --workdir=RUN --goals=panda:play ...

Goals are frames of held-out episodes, `--ahead` frames after the start. Writes RUN/planning.json (every distance),
RUN/planning.md (the table) and films of the first starts with the goal beside in RUN/plans/.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from launch import cli

if TYPE_CHECKING:
    from data.datasets import Datasets
    from data.episodes import EpisodeStore
    from rlawm_jax.planning.judge import Judged
    from rlawm_jax.planning.planner import Planner
    from rlawm_jax.planning.probe import PositionProbe
    from rlawm_jax.sim.protocol import Task

PROBE_FRAMES = 3000  # of training episodes

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of the world model.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to plan with; the newest by default.", lower_bound=0)
GOALS = flags.DEFINE_string("goals", None, "Recorded episodes that starts and goals come from, as in panda:play.")
SIMULATOR = flags.DEFINE_string("simulator", None, "The true world; by default the one that --goals were recorded in.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the built datasets, if not the run's data.root.")
AHEAD = flags.DEFINE_list("ahead", ["8", "16", "32"], "Frames between start and goal.")
COUNT = flags.DEFINE_integer("count", 100, "Starts for each of --ahead.", lower_bound=2)
METHOD = flags.DEFINE_enum("method", "cem", ["cem", "mppi", "gradient"], "How action sequences are searched.")
DISTANCE = flags.DEFINE_enum(
    "distance", "positions", ["positions", "tokens"],
    "Between positions that a linear probe reads from imagined and goal tokens, or between the tokens.",
)  # fmt: skip
COST = flags.DEFINE_enum("cost", "end", ["end", "closest"], "Distance at the end, or at the closest approach.")
EFFORT = flags.DEFINE_float(
    "effort", None,
    "Weight of the mean absolute action in the cost; by default 0.05 where zeros hold the robot still, else 0.",
    lower_bound=0.0,
)  # fmt: skip
CANDIDATES = flags.DEFINE_integer("candidates", 96, "Sequences tried per round.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 6, "Rounds of the search.", lower_bound=1)
DRAWS = flags.DEFINE_integer(
    "draws",
    0,
    "Draws of the flow's noise that a cost is averaged over; 0: its mean, in one step.",
    lower_bound=0,
)
EXECUTE = flags.DEFINE_integer("execute", 4, "Rows of a plan that are executed before the next plan.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 5, "Goals planned for in one call.", lower_bound=1)
WORLDS = flags.DEFINE_integer("worlds", 25, "Simulators held at a time.", lower_bound=1)
VIDEOS = flags.DEFINE_integer("videos", 4, "Film the plans of this many starts, the goal beside.", lower_bound=0)
RADII = flags.DEFINE_list("radii", ["0.025", "0.05"], "Distances that count as success, in the dataset's unit.")
MOVED = flags.DEFINE_float("moved", 0.02, "An object counts where start and goal are farther apart than this.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of starts, candidates and noise.", lower_bound=0)
flags.mark_flags_as_required(["workdir", "goals"])


def main() -> None:
    """Plan from every start, run the floors and the roof, and write distances and table."""
    from data.datasets import Datasets
    from rlawm_jax import sim
    from rlawm_jax.planning import judge
    from rlawm_jax.planning.goals import problems
    from rlawm_jax.reports.planning import format_table
    from rlawm_jax.training.restore import load_world_model

    aheads, radii = numbers("ahead", int, AHEAD.value), numbers("radii", float, RADII.value)
    model, config, info = load_world_model(WORKDIR.value, step=STEP.value, with_backbone=True)
    datasets = Datasets(DATA_DIR.value or config.data.root, [GOALS.value], mask_top=config.data.mask_top)
    datasets.check_image_size(config.backbone.image_size, "--goals")
    simulator = SIMULATOR.value or sim.for_dataset(GOALS.value)
    if simulator is None:
        raise ValueError(f"--simulator: expected one of {', '.join(sim.SIMULATORS)} for {GOALS.value}, found none")
    worlds = [sim.make(simulator, config.backbone.image_size) for _ in range(min(WORLDS.value, COUNT.value))]
    check_model(config, info, worlds[0].task)
    store = datasets.stores[GOALS.value]
    effort = check_effort(store)
    probe, errors = fit_probe(model, config, info, datasets) if DISTANCE.value == "positions" else (None, None)
    planner = make_planner(model, config, probe, worlds[0].task, effort)
    rows = store.rows(config.data.val_episodes, validation=True)
    results: dict[int, list[Judged]] = {}
    moved: dict[int, np.ndarray] = {}
    clusters: dict[int, np.ndarray] = {}
    for ahead in aheads:
        recorded = problems(store, rows, ahead, COUNT.value, seed=SEED.value)
        tasks = [judge.replayed(problem, worlds[0]) for problem in recorded]
        results[ahead] = run_all(planner, tasks, ahead, worlds)
        moved[ahead] = np.stack([np.linalg.norm(t.goal_positions - t.start_positions, axis=-1) for t in tasks])
        clusters[ahead] = np.array([task.row for task in tasks])
    table = format_table(results, moved, clusters, radii=radii, threshold=MOVED.value)
    workdir = Path(WORKDIR.value)
    record = {
        "command": " ".join(sys.argv),
        "flags": {flag.name: flag.value for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]]},
        "probe_errors": errors,
        "results": {
            ahead: {
                j.method: {"distances": j.distances.round(4).tolist(), "seconds_per_plan": j.seconds_per_plan}
                for j in judged
            }
            for ahead, judged in results.items()
        },
        "moved": {ahead: values.round(4).tolist() for ahead, values in moved.items()},
        "episodes": {ahead: values.tolist() for ahead, values in clusters.items()},
    }
    (workdir / "planning.json").write_text(json.dumps(record) + "\n")
    (workdir / "planning.md").write_text(table + "\n")
    print(f"{table}\n\n{workdir / 'planning.json'}")


def numbers(flag: str, kind: "type", texts: list[str]) -> list:
    """A list flag's values, all above zero."""
    try:
        values = [kind(text) for text in texts]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"--{flag}: expected numbers above 0, found {','.join(texts) or 'none'}")
    return values


def fit_probe(model: Any, config: Any, info: dict, datasets: "Datasets") -> "tuple[PositionProbe, list[float]]":
    """A probe fitted on frames of training episodes, and its mean error on held-out ones: effector, then objects."""
    from rlawm_jax.planning import probe
    from rlawm_jax.weights.backbone import frame_encoder

    store, fingerprint = datasets.stores[GOALS.value], info["fingerprint"]
    # without a cache of these very frames, as with --data_dir, they are encoded
    with contextlib.suppress(ValueError, FileNotFoundError):
        datasets.open_tokens(config.data.token_root, fingerprint)
    encode, val = frame_encoder(model.backbone), config.data.val_episodes
    training, held_out = store.rows(val, validation=False), store.rows(val, validation=True)
    fitted = probe.fit(*probe.sample(datasets, GOALS.value, training, PROBE_FRAMES, encode, seed=SEED.value))
    errors = probe.errors(fitted, *probe.sample(datasets, GOALS.value, held_out, 200, encode, seed=SEED.value))
    print("positions read by the probe on held-out frames are off by", ", ".join(f"{e:.3f}" for e in errors))
    return fitted, errors.round(4).tolist()


def check_model(config: Any, info: dict, task: "Task") -> None:
    """Refuse a world model that plans for the task cannot be made in."""
    if missing := [part for part in ("rla", "denoiser") if part not in info["trained_parts"]]:
        raise ValueError(f"--workdir: expected a trained {', '.join(missing)} in {WORKDIR.value}, found none")
    for name, needed in (("stride", 1), ("last_action", False)):
        if config.data[name] != needed:
            raise ValueError(
                f"--workdir: expected data.{name}={needed}, since k planned rows lead k frames on, found "
                f"{config.data[name]} in {WORKDIR.value}"
            )
    dims = dict(config.denoiser.action_dims)
    if task.action_dim not in dims.values():
        raise ValueError(
            f"--simulator: expected actions of {' or '.join(map(str, dims.values()))} numbers as the world model in "
            f"{WORKDIR.value} reads, found {task.action_dim} in {task.simulator}"
        )


def check_effort(store: "EpisodeStore") -> float:
    """The weight of the effort; a target to move to is no effort, however large its numbers are."""
    still_at_zero = store.description.hold_still == "zeros"
    if EFFORT.value and not still_at_zero:
        raise ValueError(
            f"--effort: expected 0, since zeros do not hold the robot of {store.reference} still, found {EFFORT.value}"
        )
    return (0.05 if still_at_zero else 0.0) if EFFORT.value is None else EFFORT.value


def make_planner(model: Any, config: Any, probe: "PositionProbe | None", task: "Task", effort: float) -> "Planner":
    """The planner that the flags describe, for the actions of a simulator's task."""
    from rlawm_jax.evaluation.chunking import longest_chunk
    from rlawm_jax.flow import MEAN, Sampler
    from rlawm_jax.planning.cost import GoalCost, token_distance
    from rlawm_jax.planning.optimise import Search
    from rlawm_jax.planning.planner import Planner

    cost = GoalCost(
        chunk=longest_chunk(config),
        draws=max(DRAWS.value, 1),
        approach=COST.value,
        sampler=Sampler(**config.sampler) if DRAWS.value else MEAN,
        distance=probe.distance if probe else token_distance,
        effort=effort,
    )
    bounds = {"low": task.action_low, "high": task.action_high}
    search = Search(**bounds, method=METHOD.value, rounds=ROUNDS.value, candidates=CANDIDATES.value)
    robot = next(int(robot) for robot, dim in config.denoiser.action_dims.items() if dim == task.action_dim)
    return Planner(model, cost, search, batch=BATCH.value, robot_id=robot, seed=SEED.value)


def run_all(planner: "Planner", tasks: list, ahead: int, worlds: list) -> "list[Judged]":
    """The planner, the floors and the roof on the same starts; a chunk more is executed than the first plan has."""
    from rlawm_jax.planning import judge
    from rlawm_jax.run_folder.logging import progress
    from rlawm_jax.sim.video import write_video

    steps = planner.whole(ahead) + planner.chunk
    parts: dict[str, list[Judged]] = {}
    seconds, plans = 0.0, 0
    with progress(len(tasks) * -(-steps // EXECUTE.value), 0, f"plan {ahead} ahead") as bar:
        for i in range(0, len(tasks), len(worlds)):
            some = tasks[i : i + len(worlds)]
            choose = judge.Replanning(planner, some, execute=EXECUTE.value, progress=bar.update)
            methods = {
                METHOD.value: choose,
                "recorded actions": judge.recorded(some),
                "standing still": judge.still,
                "random actions": judge.uniform(some),
            }
            for name, method in methods.items():
                films = judge.Films(worlds[: len(some)], some, VIDEOS.value if name == METHOD.value and not i else 0)
                parts.setdefault(name, []).append(
                    judge.run(name, method, worlds[: len(some)], some, steps, films.watch)
                )
                for number, frames in enumerate(films.frames):
                    file = Path(WORKDIR.value) / "plans" / f"ahead_{ahead}_{number}.mp4"
                    write_video(file, frames, per_second=worlds[0].task.control_hz)
            if i:  # the first call includes compilation
                seconds, plans = seconds + choose.seconds, plans + choose.plans
    return [
        judge.Judged(
            name,
            np.concatenate([part.distances for part in judged]),
            seconds / plans if plans and name == METHOD.value else None,
        )
        for name, judged in parts.items()
    ]


if __name__ == "__main__":
    cli.run(main)
