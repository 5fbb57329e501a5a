import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def grey(value, size=(24, 32)):
    return np.full((*size, 3), value, np.uint8)


def write_video(path, values):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(value), format="rgb24")))
        container.mux(stream.encode())


def write_images(folder, values):
    (folder / "frames").mkdir()
    for index, value in enumerate(values):
        Image.fromarray(grey(value)).save(folder / "frames" / f"{index:03}.png")


@pytest.fixture
def source(tmp_path):
    """Episode `a` from a video, `b` from images; frame t has brightness 40 t, action t is (t, -t)."""
    values = [0, 40, 80, 120]
    actions = np.stack([np.arange(4), -np.arange(4)], axis=1)
    for name in ("a", "b"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        np.savez(tmp_path / "clips" / name / "episode.npz", actions=actions, control_hz=5.0, success=True, text=name)
    write_video(tmp_path / "clips" / "a" / "video.mp4", values)
    write_images(tmp_path / "clips" / "b", values)
    return tmp_path / "clips"


def build(source, data_dir, *more):
    command = [sys.executable, "-m", "data.build", "folder", f"--source={source}", f"--data_dir={data_dir}"]
    return subprocess.run([*command, "--image_size=16", *more], cwd=ROOT, capture_output=True, text=True, check=False)


READ_BACK = """
import sys
import numpy as np
import data.build
from absl import flags
flags.FLAGS(["x", "--source={source}", "--data_dir={data_dir}", "--image_size=16"])
[builder] = data.build.make_builders("folder")
data.build.build(builder)
import tensorflow_datasets as tfds
from data import schema
source = tfds.builder_from_directory("{data_dir}/folder/clips_16px/1.0.0").as_data_source("episodes")
episodes = [schema.from_example(example) for example in source]
assert [e.text for e in episodes] == ["a", "b"] and [e.episode_id for e in episodes] == [0, 1]
for e in episodes:
    schema.validate(e, e.text)
    brightness = e.frames.mean(axis=(1, 2, 3))
    assert np.abs(brightness - 40 * e.actions[:, 0]).max() < 8, brightness
    assert e.frames.shape == (4, 16, 16, 3) and e.success and e.control_hz == 5.0 and e.state is None
print("TensorFlow imported:", "tensorflow" in sys.modules)
"""


def test_a_folder_of_videos_and_images_is_built_and_read_without_tensorflow(source, tmp_path):
    code = READ_BACK.format(source=source, data_dir=tmp_path / "datasets")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TensorFlow imported: False" in done.stdout

    again = build(source, tmp_path / "datasets")
    assert again.returncode == 0, again.stderr
    assert "already built" in again.stdout


def test_a_broken_episode_stops_the_build_with_one_line_and_leaves_nothing_behind(source, tmp_path):
    np.savez(source / "b" / "episode.npz", actions=np.zeros((3, 2)), control_hz=5.0)
    done = build(source, tmp_path / "datasets")
    assert done.returncode == 1
    expected = f"data.build: {source}/b: actions: expected 4 rows (one per frame), found 3; cut or pad it to the frames"
    assert done.stderr.strip().splitlines()[-1] == expected
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "datasets").rglob("*") if path.is_file()]


def break_video(source):
    (source / "a" / "video.mp4").write_bytes((source / "a" / "video.mp4").read_bytes()[:200])


def break_image(source):
    (source / "b" / "frames" / "001.png").write_bytes(b"\x89PNG nonsense")


def break_npz(source):
    (source / "b" / "episode.npz").write_bytes(b"PK nonsense")


def misspell_key(source):
    np.savez(source / "b" / "episode.npz", acitons=np.zeros((4, 2)))


def drop_rate(source):
    np.savez(source / "b" / "episode.npz", actions=np.zeros((4, 2)))


def forget_frames(source):
    (source / "a" / "video.mp4").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_video, "a/video.mp4: expected a readable video, found "),
        (break_image, "b/frames/001.png: expected a readable image, found "),
        (break_npz, "b/episode.npz: expected an npz file of plain arrays, found "),
        (misspell_key, "did you mean actions?"),
        (drop_rate, "b: control_hz: expected the action rate in Hz, found none; add it to episode.npz"),
        (forget_frames, "a: frames: expected video.mp4 or a folder frames, found neither; keep one of them"),
    ],
)
def test_a_damaged_file_gives_one_line_that_names_it(source, spoil, message):
    from data.folder.builder import read_episode
    from data.schema import EpisodeError

    spoil(source)
    with pytest.raises(EpisodeError) as error:
        for index, name in enumerate("ab"):
            read_episode(source / name, index, 16)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pushed"],
            "data.build: NAME: expected one of folder, iws, lerobot, maniskill, maniskill_native, panda, pusht, "
            "found pushed; see --help",
        ),
        (["folder"], "data.build: --data_dir: expected a folder for the datasets, found nothing; add --data_dir=DIR"),
        (
            ["folder", "--data_dir=x", "--source=/no/where"],
            "data.build: --source: expected a folder of episodes, found /no/where; add --source=DIR",
        ),
    ],
)
def test_a_wrong_command_line_gives_one_line(arguments, message):
    command = [sys.executable, "-m", "data.build", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == message
