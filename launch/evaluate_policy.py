"""Run a policy in the real simulator: python -m launch.evaluate_policy --workdir=RUN [--against=RUN2] ...

Writes RUN/closed_loop.json (every seed's outcome), RUN/closed_loop.md (the table), RUN/closed_loop.html (the same as a
page, with videos of the first seeds) and RUN/videos/.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import cli

if TYPE_CHECKING:
    from rlawm_jax.evaluation.closed_loop import ClosedLoop

ROWS = 8  # per observation of a baseline, as many as a policy executes
BASELINE_IMAGE_SIZE = 224  # of a baseline's videos

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of the policy; with --baseline, any folder for its results.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.", lower_bound=0)
AGAINST = flags.DEFINE_string(
    "against", None, "Run folder evaluated before on the same seeds: adds a paired comparison."
)
BASELINE = flags.DEFINE_enum("baseline", None, ["random", "still"], "Evaluate this instead of a trained policy.")
SIMULATOR = flags.DEFINE_string(
    "simulator", None, "pusht, panda_touch, panda_push or panda_mark; by default that of the policy's demonstrations."
)
EPISODES = flags.DEFINE_integer("episodes", 200, "Episodes, one per seed.", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 10_000, "First seed; the starts do not depend on the policy.", lower_bound=1)
VIDEOS = flags.DEFINE_integer("videos", 4, "Record this many, from the first seed on.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch_size", 50, "Frames in one call of the policy.", lower_bound=1)
REUSE = flags.DEFINE_bool("reuse", False, "Read WORKDIR/closed_loop.json instead of running its episodes again.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Run (or read) the episodes, compare, and write the outcomes and the table."""
    from rlawm_jax.evaluation import closed_loop
    from rlawm_jax.reports.closed_loop import format_markdown, write_report

    workdir = Path(WORKDIR.value)
    check_folders(workdir)
    other = closed_loop.load(AGAINST.value) if AGAINST.value else None
    result = closed_loop.load(workdir) if REUSE.value else evaluate(workdir, other)
    comparison = closed_loop.compare(result, other) if other else None
    imagined = closed_loop.load_imagined(workdir)
    closed_loop.write(workdir, result, comparison)
    page = write_report(workdir, result, comparison, imagined)
    print(format_markdown(result, comparison, imagined))
    print(f"{workdir / closed_loop.RESULTS_FILE}\n{page}")


def check_folders(workdir: Path) -> None:
    """Refuse to overwrite a trained policy's results with a baseline's, and to compare a run with itself."""
    if BASELINE.value and (workdir / "checkpoints").exists():
        raise ValueError(
            f"--workdir: expected a separate folder for the results of --baseline, found the run {workdir}"
        )
    if AGAINST.value and Path(AGAINST.value).resolve() == workdir.resolve():
        raise ValueError(f"--against: expected a folder other than --workdir, found {AGAINST.value} twice")


def evaluate(workdir: Path, other: "ClosedLoop | None") -> "ClosedLoop":
    """Run all episodes and record the first ones."""
    from rlawm_jax import sim
    from rlawm_jax.evaluation import closed_loop
    from rlawm_jax.reports.closed_loop import VIDEO_FOLDER, video_path
    from rlawm_jax.run_folder.logging import progress
    from rlawm_jax.sim import rollout
    from rlawm_jax.sim.video import write_video

    seeds = range(SEED.value, SEED.value + EPISODES.value)
    if BASELINE.value:
        decide = {"random": rollout.uniform, "still": rollout.still}[BASELINE.value](ROWS)
        policy, facts = f"{BASELINE.value} (baseline)", {"image_size": BASELINE_IMAGE_SIZE}
        recorded = ()
    else:
        from rlawm_jax.policy.actor import Actor

        step = newest(workdir) if STEP.value is None else STEP.value
        actor = Actor.load(workdir, step=step)
        decide = rollout.watching(actor, min(BATCH.value, len(seeds)))
        policy, facts = str(workdir), {"image_size": actor.image_size, "step": step}
        recorded = actor.config.data.demonstrations
    make_world = partial(sim.make, SIMULATOR.value or recording_simulator(recorded), facts["image_size"])
    task = make_world().task
    if other:
        closed_loop.check_pairing(closed_loop.plain(task), seeds, other)
    with progress(len(seeds) * task.max_steps, 0, "act") as bar:
        episodes = rollout.rollout(make_world, decide, seeds, videos=VIDEOS.value, progress=bar.update)
    for stale in (workdir / VIDEO_FOLDER).glob("seed_*.mp4"):
        stale.unlink()
    for episode in episodes:
        if episode.frames:
            write_video(video_path(workdir, episode.seed), episode.frames, per_second=task.control_hz)
    return closed_loop.summarise(policy, episodes, **facts, command=" ".join(sys.argv))


def recording_simulator(demonstrations: Sequence[str]) -> str:
    """The simulator that the first demonstrations were recorded in."""
    from rlawm_jax import sim

    simulator = sim.for_dataset(demonstrations[0]) if demonstrations else None
    if simulator is None:
        of = f"{', '.join(demonstrations)}, which no simulator here recorded" if demonstrations else "no demonstrations"
        raise ValueError(f"--simulator: expected one of {', '.join(sim.SIMULATORS)}, found none, and {of}")
    return simulator


def newest(workdir: Path) -> int | None:
    """Step of the newest checkpoint."""
    from rlawm_jax.run_folder.checkpoint import Checkpointer

    checkpoints = Checkpointer(workdir, read_only=True)
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


if __name__ == "__main__":
    cli.run(main)
