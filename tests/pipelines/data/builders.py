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
from pipelines.data.media.samples import DecodeSettings
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


def write_sounding_clip(
    path: Path,
    samples: np.ndarray,
    *,
    rate_hz: int,
    codec: str = "aac",
    video_s: float | None = None,
    sound_from_s: float = 0.0,
    fps: int = 10,
) -> Path:
    """Write a clip of grey frames with a sound of float samples, mono, that begins `sound_from_s` into it."""
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=fps), container.add_stream(codec, rate=rate_hz)
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        sound.layout = "mono"
        count = round((len(samples) / rate_hz if video_s is None else video_s) * fps)
        # In turn, as players want it: both streams' packets lie near each other.
        size = rate_hz // fps
        for index in range(max(count, -(-len(samples) // size))):
            if index < count:
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, dtype=np.uint8), format="rgb24")
                frame.pts = index
                container.mux(pictures.encode(frame))
            piece = samples[index * size : (index + 1) * size].astype(np.float32)
            if len(piece):
                levels = np.rint(piece * 32767).astype(np.int16) if codec == "pcm_s16le" else piece
                layout = {"pcm_s16le": "s16", "aac": "fltp"}.get(codec, "flt")
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(levels)[None], format=layout, layout="mono")
                frame.sample_rate, frame.pts = rate_hz, index * size + round(sound_from_s * rate_hz)
                container.mux(sound.encode(frame))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    return path


def stairs(length_s: float, rate_hz: int) -> np.ndarray:
    """A sine at half loudness whose pitch tells the second: 300 Hz in the first, 100 Hz more in each after it."""
    times_s = np.arange(round(length_s * rate_hz)) / rate_hz
    return 0.5 * np.sin(2 * np.pi * (300 + 100 * np.floor(times_s)) * times_s)


def heard_seconds(samples: np.ndarray, rate_hz: int) -> list[int | None]:
    """Which seconds of `stairs` each tenth of a second of samples is of; None for silence."""
    found: list[int | None] = []
    for start in range(0, len(samples) - rate_hz // 10 + 1, rate_hz // 10):
        spectrum = np.abs(np.fft.rfft(samples[start : start + rate_hz // 10]))
        # A tenth of a second tells 10 Hz apart.
        found.append(round((spectrum.argmax() * 10 - 300) / 100) if spectrum.max() > 0.01 * rate_hz else None)
    return found
