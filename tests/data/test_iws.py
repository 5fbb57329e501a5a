"""The release's IWS layout: one dataset per task, 2-D target rows as they are, pictures that are not square."""

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from data.iws import builder as iws  # noqa: E402
from data.schema import EpisodeError, from_example  # noqa: E402
from tests.data.release_tree import (  # noqa: E402
    assert_windows_aligned,
    build,
    episodes_of,
    loader,
    targets,
    write_index,
    write_trajectory,
)

SIZE = (48, 64)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    source = tmp_path_factory.mktemp("iws_converted")
    for task, width in (("pusht", 4), ("bimanual_box", 14)):
        for index, length in enumerate([10, 12, 9, 11]):
            folder = source / task / f"traj_{index:06d}"
            rows = targets(index, length, width)
            camera = {"camera": "camera_0", "size": SIZE, "num_objects": 0, "success": None}
            write_trajectory(folder, index, length, target_rows=rows, masks_missing=index == 3, **camera)
        write_index(source / task, "panda")
    (source / "summary.json").write_text("{}")
    return source


def test_each_task_becomes_a_dataset_of_its_own_width_with_aligned_windows(tree, tmp_path):
    layouts = iws.layouts(tree, 40)
    assert {layout.name: layout.spec.action_dim for layout in layouts} == {"pusht": 4, "bimanual_box": 14}
    for layout in layouts:
        built = build(iws.IWSBuilder, layout, tmp_path)
        assert_windows_aligned(loader(tmp_path, f"iws/{layout.name}_40px:episodes"), masks=True)
        examples = episodes_of(built, "episodes")
        assert [len(example["frames"]) for example in examples] == [10, 12, 9, 10]
        episode = from_example(examples[0])
        assert episode.frames.shape == (10, 40, 40, 3) and episode.object_positions is None
        np.testing.assert_array_equal(episode.actions, targets(0, 10, layout.spec.action_dim))
        assert not episode.success and episode.robot_id == 0


def test_one_task_may_be_named_and_a_missing_camera_is_said(tree):
    [layout] = iws.layouts(tree / "pusht", 40)
    assert layout.name == "pusht"
    [layout] = iws.layouts(tree / "pusht", 40, camera="camera_1")
    with pytest.raises(
        EpisodeError, match="camera_1_rgb: expected a video or image folder, found cameras camera_0; see"
    ):
        layout.read(layout.recordings()[0])
