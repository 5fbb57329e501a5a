"""Apache Beam writes the same dataset as the worker processes do."""

from pathlib import Path

import pytest

beam = pytest.importorskip("apache_beam")
pytest.importorskip("h5py")

import tensorflow_datasets as tfds  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from data.maniskill import builder as maniskill  # noqa: E402
from data.recordings import BuildError, RecordingsConfig, skipped  # noqa: E402
from tests.data.release_tree import build, write_trajectory  # noqa: E402


def with_beam(layout, data_dir: Path, **options) -> maniskill.ManiSkillBuilder:
    """Build as data.build does with --beam_pipeline_options=runner=DirectRunner."""
    config = RecordingsConfig.of(layout, **options)
    builder = maniskill.ManiSkillBuilder(config=config, data_dir=data_dir, file_format="array_record")
    download_config = tfds.download.DownloadConfig(beam_options=PipelineOptions(["--runner=DirectRunner"]))
    builder.download_and_prepare(download_dir=data_dir / "nothing", download_config=download_config)
    return builder


@pytest.mark.slow
def test_the_direct_runner_writes_what_the_processes_write(tmp_path):
    group = tmp_path / "src/ppo/panda/PullCube-v2/success"
    for index in range(10):
        write_trajectory(group / f"traj_{index:06d}", index, 6)
    (group / "traj_000004" / "metadata.h5").unlink()
    [layout] = maniskill.layouts(tmp_path / "src", 32)
    plain = build(maniskill.ManiSkillBuilder, layout, tmp_path / "plain")

    builder = with_beam(layout, tmp_path / "beam")
    reports = [
        {path.name: path.read_bytes() for path in Path(b.data_dir).glob("*.array_record*")} for b in (plain, builder)
    ]
    assert reports[0] == reports[1] and len(reports[0]) == 2
    assert [entry["episode"] for entry in skipped(Path(builder.data_dir))["skipped"]] == [4]


@pytest.mark.slow
def test_a_strict_build_stops_in_one_line_and_resumes_once_the_episode_is_repaired(tmp_path):
    group = tmp_path / "src/ppo/panda/PullCube-v2/success"
    for index in range(9):
        write_trajectory(group / f"traj_{index:06d}", index, 6)
    metadata = group / "traj_000008" / "metadata.h5"
    metadata.rename(tmp_path / "kept.h5")
    [layout] = maniskill.layouts(tmp_path / "src", 32)
    with pytest.raises(BuildError, match="traj_000008") as stopped:
        with_beam(layout, tmp_path / "beam", strict=True)
    assert "\n" not in str(stopped.value)
    (tmp_path / "kept.h5").rename(metadata)
    builder = with_beam(layout, tmp_path / "beam", strict=True)
    assert builder.info.splits["PullCube_v2_success"].num_examples == 9
    assert not list((tmp_path / "beam").rglob("*.partial"))
