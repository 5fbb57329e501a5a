"""What checkpoints cost, and how much longer a resumed process takes to its first step than a new one.

    python -m tests.tools.lost_time --config=configs/pusht.py:demo [--config.data.root=...]

Runs the first steps of the real training in processes of their own and a folder that is deleted afterwards. What a
checkpoint costs is the time from the step at which it begins to the first step after it is on disk, less what as many
steps take that no checkpoint disturbs: waiting for it and being slowed down by what writes it. The config's
`train.checkpoint_every` then says which share of the time that is. Starts are timed from the birth of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKPOINTS, EVERY = 6, 30


def child(out: Path, steps: int, arguments: list[str]) -> None:
    """Train for so many steps, and write down when each ended and when each checkpoint was begun and on disk."""
    from launch import cli, train
    from rlawm_jax.run_folder.checkpoint import Checkpointer
    from rlawm_jax.training import loop

    times: dict[str, Any] = {"steps": [], "begun": [], "held": [], "done": [], "bytes": 0}
    step_done, save, finish = loop.Goodput.step_done, loop.Loop.save, Checkpointer._finish

    def timed_step(self, step):
        step_done(self, step)
        times["steps"].append(time.perf_counter())
        if len(times["steps"]) == steps:
            raise SystemExit(0)

    def timed_save(self, *args, **kwargs):
        times["begun"].append(time.perf_counter())
        save(self, *args, **kwargs)
        times["held"].append(time.perf_counter() - times["begun"][-1])

    def timed_finish(self, step, folder, final):
        finish(self, step, folder, final)
        times["done"].append(time.perf_counter())
        times["bytes"] = sum(path.stat().st_size for path in Path(final).rglob("*") if path.is_file())

    loop.Goodput.step_done, loop.Loop.save, Checkpointer._finish = timed_step, timed_save, timed_finish
    sys.argv = ["launch.train", *arguments]
    try:
        cli.run(train.main)
    except SystemExit as ended:
        if len(times["steps"]) < steps:
            raise SystemExit(ended.code or f"ended after {len(times['steps'])} of {steps} steps") from None
    out.write_text(json.dumps(times))


def run(folder: Path, steps: int, arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what `child` found, the run's account of its time) after a process that trains for `steps` in `folder`."""
    out = folder.with_suffix(".json")
    command = [
        sys.executable,
        "-m",
        "tests.tools.lost_time",
        f"--child={out}",
        f"--steps={steps}",
        f"--workdir={folder}",
    ]
    done = subprocess.run([*command, *arguments], check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(out.read_text()), json.loads((folder / "goodput.json").read_text())


def costs(times: dict[str, Any]) -> tuple[float, list[float]]:
    """(seconds of an undisturbed step, seconds that each checkpoint cost)."""
    ends, clean, spans = times["steps"], [], []
    for begun, done in zip(times["begun"], times["done"], strict=False):
        first = next(i for i, end in enumerate(ends) if end > begun)
        last = next((i for i, end in enumerate(ends) if end > done), None)
        if last is not None:
            spans.append((first, last))
    if not spans:
        sys.exit("expected a checkpoint that is on disk before the last step, found none; raise --every")
    disturbed = {i for first, last in spans for i in range(first, last + 1)}
    # the first steps warm up; whatever comes after the last whole checkpoint may be disturbed by the next one
    for i in range(5, spans[-1][1] + 1):
        if i not in disturbed:
            clean.append(ends[i] - ends[i - 1])
    if not clean:
        sys.exit("expected steps that no checkpoint disturbs, found none; raise --every")
    step = statistics.median(clean)
    return step, [ends[last] - ends[first - 1] - (last - first + 1) * step for first, last in spans]


def configured_interval(arguments: list[str]) -> int | None:
    """Steps between two checkpoints as the command line has them; None where it names no recipe."""
    from ml_collections.config_flags import config_flags

    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    if "--config" not in given:
        return None
    recipe = config_flags.ConfigFileFlagParser("config").parse(given["--config"])
    return int(given.get("--config.train.checkpoint_every", recipe.train.checkpoint_every))


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between two checkpoints while measuring")
    parser.add_argument("--repeats", type=int, default=3, help="starts of either kind")
    options, arguments = parser.parse_known_args()
    if options.child:
        child(options.child, options.steps, arguments)
        return
    interval = configured_interval(arguments)
    if interval is None:
        parser.error("expected --config=configs/NAME.py[:variant], found none")
    arguments += [f"--config.train.checkpoint_every={options.every}", "--config.logging.tensorboard=False"]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="rlawm_jax-lost_time-") as scratch:
        root, cold, resumed = Path(scratch), [], []
        run(root / "warm_up", 1, arguments)  # caches of tokens, of files
        for i in range(options.repeats):
            folder = root / str(i)
            steps = CHECKPOINTS * options.every if i == 0 else options.every + 5
            times, account = run(folder, steps, arguments)
            if i == 0:
                step, cost = costs(times)
                held, size = statistics.median(times["held"]), times["bytes"]
            cold.append(account["seconds"]["start"])
            resumed.append(run(folder, 1, arguments)[1]["recoveries"][-1])
    each = statistics.median(cost)
    print(
        f"a checkpoint of {size / 2**20:.1f} MiB holds the loop for {held:.3f} s and costs {each:.3f} s in all (median "
        f"of {len(cost)}, {min(cost):.3f} to {max(cost):.3f}); every {interval} steps of {step:.3f} s that is "
        f"{100 * each / (interval * step):.2f} % (limit 2 %)"
    )
    new, again = statistics.median(cold), statistics.median(resumed)
    print(
        f"first step after {new:.1f} s new, {again:.1f} s resumed: {again / new:.2f} x (limit 1.3 x; medians of "
        f"{options.repeats})"
    )


if __name__ == "__main__":
    main()
