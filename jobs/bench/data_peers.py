"""The data benchmark's peers: a torch DataLoader over Pillow, decord, PyAV and TorchCodec, in a separate process.

Each peer is written for speed: one decoding thread per worker, and frames resized during conversion. All make the same
tensors as ours: short side to 224, centre crop, uint8.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from qformer.torch_build.torchvision import import_torchvision

SIDE = 224
NUM_FRAMES = 8
Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedWindow:
    """Timed batches of a stream: those after the warm-up and before the tail."""

    warm_up: int
    timed: int
    tail: int = 2
    """Batches after the timed ones, so that the workers are busy until the end of the window."""

    @property
    def batches(self) -> int:
        """Number of batches of the whole stream."""
        return self.warm_up + self.timed + self.tail

    def seconds_per_batch(self, batches: Iterable[Any]) -> float:
        """Iterate to the end; return the mean time between arrivals inside the window."""
        arrivals = [time.perf_counter() for _ in batches]
        assert len(arrivals) == self.batches, f"{len(arrivals)} batches, not {self.batches}"
        return (arrivals[self.warm_up + self.timed - 1] - arrivals[self.warm_up - 1]) / self.timed


def read_image(path: str) -> Tensor:
    """Pillow at full size, bicubic. [3, H, W]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    short = min(image.size)
    size = (int(SIDE * image.width / short), int(SIDE * image.height / short))
    return _to_tensor(_center(np.asarray(image.resize(size, Image.Resampling.BICUBIC))))


def read_decord(path: str) -> Tensor:
    """Decord with resizing during conversion. [T, 3, H, W]."""
    import decord

    width, height = _fitted(*_video_size(path))
    reader = decord.VideoReader(path, num_threads=1, width=width, height=height)
    return _to_tensor(_center(reader.get_batch(_indices(len(reader))).asnumpy()))


def read_pyav(path: str) -> Tensor:
    """PyAV from the beginning, converting only the needed frames. [T, 3, H, W]."""
    import av

    frames = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(_indices(stream.frames))
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames.append(_resized(frame))
            if index == max(wanted):
                break
    return _to_tensor(_center(np.stack(frames)))


def read_pyav_seek(path: str) -> Tensor:
    """PyAV with a seek to each frame. [T, 3, H, W]."""
    import av

    frames = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        ticks = float(1 / (stream.average_rate * stream.time_base))
        for index in _indices(stream.frames):
            container.seek(round(index * ticks), stream=stream)
            frames.append(_resized(next(f for f in container.decode(stream) if f.pts >= round(index * ticks))))
    return _to_tensor(_center(np.stack(frames)))


def read_torchcodec(path: str) -> Tensor:
    """TorchCodec, exact seeking. [T, 3, H, W]."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    import_torchvision()  # its own import fails with a CPU-only torch
    from torchvision.transforms.v2 import InterpolationMode, functional

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    frames = decoder.get_frames_at(_indices(len(decoder))).data
    width, height = _fitted(frames.shape[-1], frames.shape[-2])
    resized = functional.resize(frames, [height, width], InterpolationMode.BICUBIC, antialias=True)
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return resized[..., top : top + SIDE, left : left + SIDE].contiguous()


VIDEO_READS: dict[str, Read] = {
    "decord": read_decord,
    "pyav": read_pyav,
    "pyav seek": read_pyav_seek,
    "torchcodec": read_torchcodec,
}


class Peer:
    """A process for DataLoaders: they fork, which is unsafe in a process with Ray's threads."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end,), daemon=False)
        self._process.start()
        child_end.close()

    def seconds_per_batch(
        self, read: Read, paths: list[str], batch_size: int, window: TimedWindow, workers: int
    ) -> float:
        """Time a DataLoader over `paths`."""
        return float(self._call(_time_loader, read, paths, batch_size, window, workers))

    def read(self, read: Read, path: str) -> NDArray[np.uint8] | str:
        """Read one file; returns the text of the error if the library is missing or fails."""
        return self._call(_read_or_error, read, path)

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()

    def _call(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._pipe.recv()


@contextlib.contextmanager
def peer() -> Iterator[Peer]:
    """A `Peer` for the length of a `with` block."""
    process = Peer()
    try:
        yield process
    finally:
        process.close()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while (request := pipe.recv()) is not None:
            function, *arguments = request
            pipe.send(function(*arguments))


class _Files(Dataset[Tensor]):
    def __init__(self, read: Read, paths: list[str]) -> None:
        self._read, self._paths = read, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(self._paths[index])


def _time_loader(read: Read, paths: list[str], batch_size: int, window: TimedWindow, workers: int) -> float:
    return window.seconds_per_batch(DataLoader(_Files(read, paths), batch_size, num_workers=workers))


def _read_or_error(read: Read, path: str) -> NDArray[np.uint8] | str:
    try:
        return read(path).numpy()
    except Exception as error:  # any error of a missing or broken library
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def _indices(num_frames: int) -> list[int]:
    """The middle of each of eight equal parts."""
    return [int((part + 0.5) * num_frames / NUM_FRAMES) for part in range(NUM_FRAMES)]


def _fitted(width: int, height: int) -> tuple[int, int]:
    short = min(width, height)
    return int(SIDE * width / short), int(SIDE * height / short)


def _video_size(path: str) -> tuple[int, int]:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        return stream.codec_context.width, stream.codec_context.height


def _resized(frame: Any) -> NDArray[np.uint8]:
    width, height = _fitted(frame.width, frame.height)
    resized = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
    return np.asarray(resized.to_ndarray(), dtype=np.uint8)


def _center(frames_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = frames_HWC.shape[-3:-1]
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    return frames_HWC[..., top : top + SIDE, left : left + SIDE, :]


def _to_tensor(frames_HWC: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames_HWC, -1, -3)))
