"""Small real files and tables for the tests of the data plane."""

import contextlib
import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.data import schema
from pipelines.data.samples import DecodeSettings
from qformer.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    height=32,
    width=32,
    resize_short_side=32,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
DECODE = DecodeSettings(preprocessing=PREPROCESSING, num_frames=4)


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (48, 40), **options) -> bytes:
    return encoded(Image.new("RGB", size, colour), "JPEG", **options)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_clip(path: Path, levels: list[int], frame_times: list[int] | None = None, size: int = 64) -> Path:
    """Write an H.264 clip whose frame i is grey of `levels[i]`, shown from `frame_times[i]` tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "1", "g": "5"}
        for index, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), level, dtype=np.uint8), format="rgb24")
            frame.pts = index if frame_times is None else frame_times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_moving_clip(path: Path, codec: str, shift: int = 0, count: int = 150) -> Path:
    """Write a ramp that moves, which takes some tenths of a second to decode."""
    ramp = (np.add.outer(np.arange(240), np.arange(320))[..., None] + 40 * shift) % 256 * np.ones(3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 320, 240
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(ramp, 3 * index, axis=1).astype(np.uint8), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def open_files(pid: int) -> list[str]:
    """Paths that a process holds open; none when it is gone."""
    try:
        return [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def manifest(rows: list[dict]) -> pa.Table:
    defaults = {schema.CAPTIONS: ["a thing"], schema.INSTRUCTIONS: [], schema.SPLIT: "train", schema.KIND: schema.IMAGE}
    return pa.Table.from_pylist([{**defaults, **row} for row in rows], schema=schema.MANIFEST_SCHEMA)


def image_manifest(folder: Path, count: int) -> pa.Table:
    rows = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        path.write_bytes(jpeg((index * 7 % 256, 10, 10)))
        rows.append(
            {schema.SAMPLE_ID: f"s{index}", schema.MEDIA: str(path), schema.CAPTIONS: [f"a{index}", f"b{index}"]}
        )
    return manifest(rows)


@contextlib.contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Let this process reserve so much more address space: what wants more fails, and does not take the machine's."""
    with open("/proc/self/statm") as file:
        now_bytes = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
