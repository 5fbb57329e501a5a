"""Evaluate a run on held-out episodes: python -m launch.evaluate --workdir=DIR [--step=N] [--windows=N] ...

With --handles=FILE, on exactly the windows of the release's evaluation, --protocol=exact (the default) or release.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from launch import cli

if TYPE_CHECKING:
    from data.pipeline import WindowLoader

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; metrics.json and report/index.html are written there.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.", lower_bound=0)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the built datasets, if not the run's data.root.")
HORIZONS = flags.DEFINE_list("horizons", None, "Horizons in frames, if not the run's eval.horizons.")
WINDOWS = flags.DEFINE_integer("windows", None, "Windows per horizon, if not the run's eval.windows.", lower_bound=1)
SAMPLES = flags.DEFINE_integer("samples", None, "Draws per window, if not the run's eval.samples.", lower_bound=1)
LPIPS = flags.DEFINE_string("lpips_weights", None, "LPIPS weights (.safetensors), if not the run's lpips_weights.")
HANDLES = flags.DEFINE_string("handles", None, "Evaluation handles of the release (JSON): its windows, not ours.")
PROTOCOL = flags.DEFINE_enum(
    "protocol", "exact", ["exact", "release"], "With --handles: every interval once, or the release's chunks."
)
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Write the table, the curve and the decoded images of one checkpoint."""
    from rlawm_jax.evaluation import motion, open_loop, results
    from rlawm_jax.hosts import on_first_process
    from rlawm_jax.image_metrics import load_lpips
    from rlawm_jax.reports import film_strips
    from rlawm_jax.reports.open_loop import read_history, write_report
    from rlawm_jax.run_folder.logging import METRICS_FILE, announce, progress
    from rlawm_jax.training.restore import load_trained_backbone, load_world_model

    workdir = Path(WORKDIR.value)
    model, config, info = load_world_model(workdir, step=STEP.value)
    if config.data.source == "frames":  # cached tokens need no backbone
        model.backbone = load_trained_backbone(config, info["fingerprint"], workdir)
    apply_flags(config)
    images = "image_decoder" in info["trained_parts"]
    weights = LPIPS.value or config.lpips_weights
    lpips = load_lpips(weights) if images and weights else None
    if not images:
        announce("the run has no trained image decoder: no image metrics, no film strips")
    elif lpips is None:
        announce("no LPIPS weights given (--lpips_weights): the column is left out")
    if HANDLES.value:
        on_handles(workdir, model, config, info, images=images, lpips=lpips)
        return
    loader = open_windows(workdir, config, info)
    loop = open_loop.OpenLoop(model, config, loader, images=images, lpips=lpips)
    with progress(open_loop.total_windows(loop), 0, "evaluate") as bar:
        bar.unit = "window"
        evaluation = open_loop.evaluate(loop, progress=bar.update)

    def write() -> None:
        complete = dataclasses.replace(evaluation, motion=motion.measure(loop))
        (workdir / "metrics.json").write_text(json.dumps(complete.to_json(), indent=1) + "\n")
        announce("drawing the report")
        page = write_report(
            workdir / "report",
            complete,
            film_strips.collect(loop),
            history=read_history(workdir / METRICS_FILE),
            provenance=info
            | {"evaluated_by": " ".join(sys.argv), "backbone": config.backbone.name, "data": list(loader.stores)},
        )
        print(f"{results.format_table(evaluation)}\n\n{workdir / 'metrics.json'}\n{page}")

    on_first_process(write)  # the others wait: five minutes after one exits, the rest of the job would be aborted


def open_windows(workdir: Path, config: ConfigDict, info: dict[str, Any]) -> "WindowLoader":
    """The windows of the run's datasets; tokens that are missing, as on another machine, are computed."""
    from functools import partial

    from data.pipeline import WindowLoader, open_datasets
    from rlawm_jax.hosts import on_first_process
    from rlawm_jax.training.restore import load_trained_backbone
    from rlawm_jax.weights.backbone import frame_encoder

    datasets, fingerprint = open_datasets(config.data), info["fingerprint"]
    if config.data.source == "tokens":
        datasets.check_image_size(config.backbone.image_size, "config.backbone.image_size")
        load = partial(load_trained_backbone, config, fingerprint, workdir)
        root, name = config.data.token_root, config.backbone.name
        datasets.compute_tokens(root, fingerprint, lambda: frame_encoder(load()), backbone=name, alone=on_first_process)
    return WindowLoader(config.data, fingerprint=fingerprint, with_frames=True, datasets=datasets)


def on_handles(workdir: Path, model: Any, config: ConfigDict, info: dict[str, Any], **images: Any) -> None:
    """Print the table by horizon and the row for all handles, and save them as JSON."""
    from rlawm_jax.evaluation import release_windows, results
    from rlawm_jax.evaluation.open_loop import OpenLoop
    from rlawm_jax.hosts import on_first_process
    from rlawm_jax.run_folder.logging import progress

    path = Path(HANDLES.value)
    handles = release_windows.select(
        release_windows.read_handles(path),
        path,
        horizons=config.eval.horizons if HORIZONS.value else None,
        count=WINDOWS.value,
    )
    config.eval.samples = SAMPLES.value or 1
    release_windows.use_datasets(config, handles, path)
    loader = open_windows(workdir, config, info)
    windows = release_windows.handle_windows(handles, loader, config, path)
    cut = release_windows.cut_of(
        PROTOCOL.value, config, info, iws=any(h.iws for same in handles.values() for h in same)
    )
    loop = OpenLoop(model, config, loader, **images, cut=cut)
    with progress(sum(map(len, windows.values())), 0, "evaluate") as bar:
        bar.unit = "window"
        table, pooled = release_windows.evaluate_handles(loop, windows, progress=bar.update)

    def write() -> None:
        output = workdir / f"handles_{PROTOCOL.value}.json"
        output.write_text(json.dumps(table.to_json() | {"handles": str(path)}, indent=1) + "\n")
        print(f"{results.format_table(table)}\n\n{release_windows.table_row(pooled, PROTOCOL.value)}\n\n{output}")

    on_first_process(write)


def apply_flags(config: ConfigDict) -> None:
    """Apply the flags that were given to the run's config."""
    given = {"windows": WINDOWS.value, "samples": SAMPLES.value}
    config.eval.update({name: value for name, value in given.items() if value is not None})
    if HORIZONS.value:
        if not all(text.isdigit() and int(text) >= 2 for text in HORIZONS.value):
            raise ValueError(
                f"--horizons: expected frames (2 or more) such as 8,15,29, found {','.join(HORIZONS.value)}"
            )
        config.eval.horizons = tuple(int(text) for text in HORIZONS.value)
    if DATA_DIR.value:
        config.data.root = DATA_DIR.value


if __name__ == "__main__":
    cli.run(main)
