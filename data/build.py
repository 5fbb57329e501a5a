"""Build datasets: python -m data.build NAME --data_dir=DIR [--source=DIR] [--image_size=N] [--limit=N] ...

NAME                SOURCE                                                      becomes
panda               (nothing: the committed traces, replayed in the simulator)  panda/112px
pusht               (nothing: the committed traces, replayed in the simulator)  pusht/112px
folder              your own recordings (data/schema.py)                        folder/NAME_112px
maniskill           the release's ManiSkill tree, or a part of it               maniskill/ROBOT_112px, one per robot
iws                 the release's IWS tree, or one task                         iws/TASK_112px, one per task
lerobot             a LeRobot dataset, v3.0 or v2.1                             lerobot/NAME_112px
maniskill_native    ManiSkill's trajectory.*.h5 + .json with RGB frames           maniskill_native/ENV_FILE_112px

The result is written to DIR/NAME/CONFIG/VERSION as ArrayRecord files. An interrupted build leaves nothing that a
reader would mistake for a dataset; run the same command again to resume it (panda and pusht start over).
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data.schema import EpisodeError

# the builder's class in data/NAME/builder.py
BUILDERS = {
    "folder": "FolderBuilder",
    "iws": "IWSBuilder",
    "lerobot": "LeRobotBuilder",
    "maniskill": "ManiSkillBuilder",
    "maniskill_native": "ManiSkillNativeBuilder",
    "panda": "PandaBuilder",
    "pusht": "PushTBuilder",
}
SIMULATED = ("panda", "pusht")  # re-rendered from committed traces: no source
SHOWN = 10  # reasons printed; skipped.json has all

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that holds all datasets; created if missing.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 112, "Height and width of the stored frames in pixels.", lower_bound=8)
_LIMIT = flags.DEFINE_integer("limit", None, "Build only this many episodes of each split.", lower_bound=1)
_SOURCE = flags.DEFINE_string("source", None, "Folder of the recordings; panda and pusht need none.")
_ONLY = flags.DEFINE_string(
    "only",
    None,
    "Build only this robot, task or file of the source; of panda and pusht, only these splits ('play,push').",
)
_CAMERA = flags.DEFINE_string("camera", None, "The camera to use if recordings have several.")
_CODEC = flags.DEFINE_enum("codec", "png", ["png", "jpeg"], "How frames are stored: lossless, or smaller.")
_STRICT = flags.DEFINE_bool(
    "strict",
    None,
    "Stop at the first unusable episode (default for folder) instead of leaving it out (default for the others).",
)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes that read episodes.", lower_bound=1)
_BEAM = flags.DEFINE_string(
    "beam_pipeline_options", None, "Build with Apache Beam: its options, as runner=DirectRunner,direct_num_workers=4"
)


def make_builders(name: str) -> list[tfds.core.DatasetBuilder]:
    """The TFDS builders that the flags describe: one per dataset in the source."""
    where = {"data_dir": _DATA_DIR.value, "file_format": "array_record"}
    module = builder_module(name)
    builder = getattr(module, BUILDERS[name])
    if name in SIMULATED:
        options = {"splits": _ONLY.value, "limit": _LIMIT.value, "workers": _WORKERS.value}
        return [builder(config=builder.config_of(_IMAGE_SIZE.value, **options), **where)]
    from data.recordings import RecordingsConfig

    cameras = {} if name == "folder" else {"camera": _CAMERA.value}
    layouts = module.layouts(Path(str(_SOURCE.value)), _IMAGE_SIZE.value, **cameras)
    chosen = [layout for layout in layouts if _ONLY.value in (None, layout.name)]
    if not chosen:
        names = ", ".join(layout.name for layout in layouts)
        raise EpisodeError(f"--only: expected one of {names}, found {_ONLY.value}; correct it")
    options = {
        "codec": _CODEC.value,
        "limit": _LIMIT.value,
        "strict": name == "folder" if _STRICT.value is None else _STRICT.value,
        "workers": _WORKERS.value,
    }
    return [builder(config=RecordingsConfig.of(layout, **options), **where) for layout in chosen]


def builder_module(name: str) -> ModuleType:
    """The module of a builder; EpisodeError names what to install if it needs a package that is not there."""
    try:
        return importlib.import_module(f"data.{name}.builder")
    except ModuleNotFoundError as error:
        from data.simulated import missing

        need = f"expected the package {error.name}, found none; pip install -r launch/requirements-data.txt"
        raise EpisodeError(f"{name}: {missing(name, error) if name in SIMULATED else need}") from error


def build(builder: tfds.core.DatasetBuilder) -> None:
    """Build the dataset unless it exists; print where it is, what it contains and what was left out."""
    from data.recordings import SKIPPED, skipped

    path = Path(builder.data_dir)
    if path.exists():
        print(f"{path}: already built, nothing to do (delete the folder to build it again)")
    else:
        with tempfile.TemporaryDirectory() as nothing_to_download:
            builder.download_and_prepare(download_dir=nothing_to_download, download_config=_download_config())
    for name, split in builder.info.splits.items():
        print(f"{path}: split {name}: {split.num_examples} episodes, {split.num_bytes / 2**20:.1f} MiB")
    report = skipped(path)
    lines = [entry["reason"] for entry in report["skipped"]] + [entry["note"] for entry in report["notes"]]
    if lines:
        print(f"{path}: {len(report['skipped'])} episodes left out, {len(report['notes'])} repaired, see {SKIPPED}:")
        print("\n".join(f"  {line}" for line in lines[:SHOWN]))
        if len(lines) > SHOWN:
            print(f"  ... and {len(lines) - SHOWN} more")


def _download_config() -> tfds.download.DownloadConfig:
    """A download config with the Beam options, if there are any."""
    if _BEAM.value is None:
        return tfds.download.DownloadConfig()
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        need = "expected the package apache-beam, found none; launch/requirements-beam.txt says how to install it"
        raise EpisodeError(f"--beam_pipeline_options: {need}") from error
    return tfds.download.DownloadConfig(beam_options=PipelineOptions([f"--{o}" for o in _BEAM.value.split(",") if o]))


def _check_flags(argv: list[str]) -> Any:
    if len(argv) != 2 or argv[1] not in BUILDERS:
        given = " ".join(argv[1:]) or "nothing"
        sys.exit(f"data.build: NAME: expected one of {', '.join(BUILDERS)}, found {given}; see --help")
    if _DATA_DIR.value is None:
        sys.exit("data.build: --data_dir: expected a folder for the datasets, found nothing; add --data_dir=DIR")
    if argv[1] not in SIMULATED and (_SOURCE.value is None or not Path(_SOURCE.value).exists()):
        sys.exit(f"data.build: --source: expected a folder of episodes, found {_SOURCE.value}; add --source=DIR")


def main(argv: list[str]) -> None:
    """Check the command line, then build."""
    _check_flags(argv)
    logging.set_verbosity(logging.ERROR)
    from data.recordings import BuildError

    try:
        for builder in make_builders(argv[1]):
            build(builder)
    except (EpisodeError, BuildError, OSError) as error:
        sys.exit(f"data.build: {error}")
    except KeyboardInterrupt:
        sys.exit("data.build: interrupted; run the same command again to resume")


if __name__ == "__main__":
    app.run(main)
