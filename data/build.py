"""Build a dataset: python -m data.build NAME --data_dir=DIR [--image_size=N] [--limit=N] [--source=DIR].

NAME is `pusht` (replays the committed Push-T traces in the simulator) or `folder` (your own recordings, see
`data/schema.py`). The result lies in DIR/NAME/CONFIG/VERSION as ArrayRecord files; an interrupted build leaves nothing
behind that a reader would take for a dataset, so run the same command again.
"""

import sys
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data.schema import EpisodeError

NAMES = ("folder", "pusht")

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that holds all datasets; created if missing.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 112, "Height and width of the stored frames in pixels.", lower_bound=8)
_LIMIT = flags.DEFINE_integer("limit", None, "Build only this many episodes of each split.", lower_bound=1)
_SOURCE = flags.DEFINE_string("source", None, "NAME=folder: the folder with one sub-folder per episode.")


def make_builder(name: str) -> tfds.core.DatasetBuilder:
    """The TFDS builder that the flags describe."""
    where = {"data_dir": _DATA_DIR.value, "file_format": "array_record"}
    if name == "pusht":
        from data.pusht.builder import PushTBuilder, PushTConfig

        return PushTBuilder(config=PushTConfig.of(_IMAGE_SIZE.value, _LIMIT.value), **where)
    from data.folder.builder import FolderBuilder, FolderConfig

    return FolderBuilder(config=FolderConfig.of(Path(_SOURCE.value), _IMAGE_SIZE.value, _LIMIT.value), **where)


def build(builder: tfds.core.DatasetBuilder) -> None:
    """Build unless it is there already; say where it is and what it holds."""
    path = Path(builder.data_dir)
    if path.exists():
        print(f"{path}: already built, nothing to do (delete the folder to build it again)")
    else:
        with tempfile.TemporaryDirectory() as nothing_to_download:
            builder.download_and_prepare(download_dir=nothing_to_download)
    for name, split in builder.info.splits.items():
        print(f"{path}: split {name}: {split.num_examples} episodes, {split.num_bytes / 2**20:.1f} MiB")


def main(argv: list[str]) -> None:
    """Check the command line, then build."""
    if len(argv) != 2 or argv[1] not in NAMES:
        found = " ".join(argv[1:]) or "nothing"
        sys.exit(f"data.build: NAME: expected one of {', '.join(NAMES)}, found {found}; see --help")
    if _DATA_DIR.value is None:
        sys.exit("data.build: --data_dir: expected a folder for the datasets, found nothing; add --data_dir=DIR")
    if argv[1] == "folder" and (_SOURCE.value is None or not Path(_SOURCE.value).is_dir()):
        sys.exit(f"data.build: --source: expected a folder of episodes, found {_SOURCE.value}; add --source=DIR")
    logging.set_verbosity(logging.ERROR)
    try:
        build(make_builder(argv[1]))
    except EpisodeError as error:
        sys.exit(f"data.build: {error}")
    except KeyboardInterrupt:
        sys.exit("data.build: interrupted, nothing was kept; run the same command again")


if __name__ == "__main__":
    app.run(main)
