"""Apache Beam writes the same dataset as the worker processes do."""

from pathlib import Path

import pytest

beam = pytest.importorskip("apache_beam")
pytest.importorskip("h5py")

import tensorflow_datasets as tfds  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from data.maniskill import builder as maniskill  # noqa: E402
from data.recordings import RecordingsConfig, skipped  # noqa: E402
from tests.data.release_tree import build, write_trajectory  # noqa: E402


@pytest.mark.slow
def test_the_direct_runner_writes_what_the_processes_write(tmp_path):
    group = tmp_path / "src/ppo/panda/PullCube-v2/success"
    for index in range(10):
        write_trajectory(group / f"traj_{index:06d}", index, 6)
    (group / "traj_000004" / "metadata.h5").unlink()
    [layout] = maniskill.layouts(tmp_path / "src", 32)
    plain = build(maniskill.ManiSkillBuilder, layout, tmp_path / "plain")

    config = RecordingsConfig.of(layout)
    builder = maniskill.ManiSkillBuilder(config=config, data_dir=tmp_path / "beam", file_format="array_record")
    download_config = tfds.download.DownloadConfig(beam_options=PipelineOptions(["--runner=DirectRunner"]))
    builder.download_and_prepare(download_dir=tmp_path / "nothing", download_config=download_config)
    found = [
        {path.name: path.read_bytes() for path in Path(b.data_dir).glob("*.array_record*")} for b in (plain, builder)
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    assert [entry["episode"] for entry in skipped(Path(builder.data_dir))["skipped"]] == [4]
