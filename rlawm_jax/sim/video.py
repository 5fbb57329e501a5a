"""Episodes as MP4 files that a browser plays (H.264)."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

SHORTER_SIDE = 224  # pixels; smaller frames are enlarged by whole factors
REST = 1.0  # seconds for which the last frame is shown


def write_video(path: str | Path, frames: Sequence[UInt8[np.ndarray, "h w 3"]], *, per_second: float) -> None:
    """Write frames of one size; an interrupted write leaves no file under `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    shown = [_enlarged(frame) for frame in frames]
    shown += shown[-1:] * round(REST * per_second)
    with av.open(temporary, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(per_second).limit_denominator(1000))
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for frame in shown:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)


def _enlarged(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "p q 3"]:
    factor = -(-SHORTER_SIDE // min(frame.shape[:2]))
    large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = large.shape[:2]
    return np.pad(large, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # yuv420p requires even sides
