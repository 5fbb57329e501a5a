"""Miniature datasets in the release's and the field's layouts; every frame shows its number as a code.

A code frame is a grid of 4 x 4 black and white blocks that spells (label, frame) in binary: lossy video leaves it
readable, and so does squashing to another size. `label` tells trajectories apart.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import av
import h5py
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from configs import base
from data.pipeline import WindowLoader
from data.recordings import RecordingsConfig

GRID = 4
FRAME_BITS = 9  # 512 frames and 128 labels
WIDTHS = {"panda": (8, 9), "xarm6_robotiq": (7, 12), "ur10e_stick": (5, 6)}  # of target_qpos and qpos
LABELS = 2 ** (GRID * GRID - FRAME_BITS)


def bits(label: int, frame: int) -> np.ndarray:
    number = label * 2**FRAME_BITS + frame
    return (number >> np.arange(GRID * GRID) & 1).astype(bool).reshape(GRID, GRID)


def mask_of(label: int, frame: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """The blocks of (label, frame) as a mask."""
    height, width = size
    rows, columns = np.arange(height) * GRID // height, np.arange(width) * GRID // width
    return bits(label, frame)[rows[:, None], columns]


def code_frame(label: int, frame: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    grey = np.where(mask_of(label, frame, size), 220, 30).astype(np.uint8)
    return grey[..., None].repeat(3, axis=2)


def code_mask(label: int, frame: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A mask that is never empty and differs from the frame."""
    return np.where(mask_of(LABELS - 1 - label, frame, size), 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)


def read_code(image: np.ndarray) -> tuple[int, int]:
    """(label, frame) of a code frame [h,w,3] or mask [h,w] of any size."""
    light = (image if image.dtype != bool else image * 255.0).reshape(*image.shape[:2], -1).mean(axis=2)
    height, width = light.shape
    centres = [[light[(2 * r + 1) * height // 8, (2 * c + 1) * width // 8] for c in range(GRID)] for r in range(GRID)]
    number = int((np.array(centres).ravel() > 127) @ (1 << np.arange(GRID * GRID)))
    return divmod(number, 2**FRAME_BITS)


def write_video(path: Path, frames: Iterable[np.ndarray], *, rate=30, codec="libx264", pix_fmt="yuv420p", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        for index, image in enumerate(frames):
            if index == 0:
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = pix_fmt
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_images(folder: Path, frames: Iterable[np.ndarray], suffix: str) -> None:
    """File names without padding zeros: 2 comes before 10 only in natural order."""
    folder.mkdir(parents=True)
    for index, image in enumerate(frames):
        Image.fromarray(image).save(folder / f"{index}{suffix}")


def targets(label: int, length: int, width: int) -> np.ndarray:
    """Row t says (t, label) and then small constants; the last column is a gripper within every robot's range."""
    rows = np.full((length, width), 0.02, np.float32)
    rows[:, 0], rows[:, 1] = np.arange(length), label
    return rows


def write_trajectory(
    folder: Path,
    label: int,
    length: int,
    *,
    camera="front_lower_camera",
    uid="panda",
    stored="mp4",
    size=(64, 64),
    frames_missing=0,
    masks_missing=0,
    success: bool | None = True,
    num_objects=2,
    target_rows: np.ndarray | None = None,
) -> None:
    """A trajectory folder of the release: lossy RGB and mask videos (or image folders) and metadata.h5."""
    folder.mkdir(parents=True)
    frames = [code_frame(label, t, size) for t in range(length - frames_missing)]
    masks = [code_mask(label, t, size) for t in range(length - masks_missing)]
    rgb, mask = f"{camera}_rgb", f"{camera}_foreground_mask"
    if stored == "folder":
        write_images(folder / rgb, frames, ".jpg")
        write_images(folder / mask, masks, ".png")
    else:
        write_video(folder / f"{rgb}.mp4", frames, crf="23", preset="fast")
        write_video(folder / f"{mask}.mp4", masks, crf="28", preset="fast")
        (folder / f"{mask}_encoding.json").write_text('{"encoding": "h264_crf28"}')
    target_dim, joints = WIDTHS[uid]
    rows = targets(label, length, target_dim)[:, None] if target_rows is None else target_rows
    with h5py.File(folder / "metadata.h5", "w") as file:
        file.create_dataset("target_qpos", data=rows).attrs["_frame_aligned"] = True
        file["qpos"] = targets(label, length, joints)[:, None].astype(np.float64)
        file["actions"] = np.zeros((length, 7), np.float32)
        if num_objects:
            file["eef_pose"] = np.zeros((length, 7), np.float32)
            poses = np.zeros((length, num_objects, 7), np.float32)
            poses[length // 2 :, 0, 0] = 0.1  # the first object jumps once, near the effector
            file["object_poses"] = poses
        # what must not be opened: a pickle that no reader needs
        file.create_dataset("robot_infos", data=np.frombuffer(b"cos\nsystem\n(S'false'\ntR.", np.uint8))
        file["robot_infos"].attrs["_pickled"] = True
        file.attrs["task_description"] = "Pull the cube."
        if success is not None:
            file.attrs["success"] = success


def write_index(folder: Path, uid: str) -> None:
    """metadata.json, and an index.json with junk keys and a stale list of trajectories."""
    (folder / "metadata.json").write_text(json.dumps({"robot_infos": [{"uid": uid, "joint_names": []}]}))
    junk = {"keys": ["front_lower_camera_foreground_mask_encoding", "metadata"], "path": "/gone/traj_000099"}
    index = {"trajectories": {"000099": junk}, "trajectory_list": ["000099"]}
    (folder / "index.json").write_text(json.dumps(index))


def label_of(group: int, index: int) -> int:
    return 16 * group + index


def build(builder_class: type, layout, data_dir: Path, **options):
    """Build a layout as data.build does."""
    builder = builder_class(
        config=RecordingsConfig.of(layout, **options), data_dir=data_dir, file_format="array_record"
    )
    builder.download_and_prepare(download_dir=data_dir / "nothing")
    return builder


def loader(data_dir: Path, *references: str, **overrides) -> WindowLoader:
    """The real window loader over built datasets, episodes 0 and 1 held out."""
    config = base.get_config().data
    config.groups = {"all": {"datasets": references, "weight": 1.0, "min_start_frame": 0}}
    config.root, config.val_episodes, config.batch_size = str(data_dir), 2, 16
    config.lock()
    config.update(overrides)
    return WindowLoader(config)


def unmasked(windows: WindowLoader) -> WindowLoader:
    """The same loader with frames as they were recorded, from which codes can be read."""
    for store in windows.stores.values():
        store.frames = lambda row, which, store=store: store.recorded(row, which)[0]
    return windows


def assert_windows_aligned(windows: WindowLoader, *, horizons=(2, 5), masks: bool) -> None:
    """Whole windows, and first and last frames of training draws, compared with the action rows by the frame codes."""
    from data.pipeline import WindowBatches

    for horizon in horizons:
        for window in windows.validation_windows(horizon, 6):
            loaded = windows.load_window(window)
            assert len(loaded["frames"]) == horizon and len(loaded["actions"]) == horizon - 1
            where = range(window.start, window.start + horizon)
            codes = [read_code(frame) for frame in windows.store_of(window).recorded(window.episode, where)[0]]
            assert [frame for _, frame in codes] == list(where)
            for (label, frame), row in zip(codes[:-1], loaded["actions"], strict=True):
                assert (row[0], row[1]) == (frame, label)
            if masks:
                recorded, shown = windows.store_of(window).recorded(window.episode, [t for _, t in codes])
                assert shown is not None
                assert [read_code(mask) for mask in shown] == [(LABELS - 1 - label, t) for label, t in codes]
                np.testing.assert_array_equal(loaded["frames"], np.where(shown[..., None], recorded, 0))
    batch = WindowBatches(unmasked(windows))[0]
    assert len(set(batch["horizon"].tolist())) > 1
    for pair, rows, horizon in zip(batch["frames"], batch["actions"], batch["horizon"], strict=True):
        (label, first), (same, last) = map(read_code, pair)
        assert same == label and last - first == horizon - 1
        np.testing.assert_array_equal(rows[: horizon - 1, 0], np.arange(first, last))
        assert (rows[: horizon - 1, 1] == label).all() and not rows[horizon - 1 :].any()


def episodes_of(builder, split: str) -> list[dict]:
    """The stored examples of a split, in order."""
    return list(tfds.builder_from_directory(builder.data_dir).as_data_source(split))
