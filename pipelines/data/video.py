"""Sample frames of one clip. Runs only in the killable child: decoders crash and hang on damaged files."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.media import MediaError
from pipelines.data.sampling import frames_at, uniform_times
from pipelines.data.transforms import Augmentation, Box, augment, fit
from qformer.preprocessing import Preprocessing

# A file may name other files or addresses (playlists, image sequences): only true containers are opened.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,gif,h264,hevc,m4v,obu,ivf"
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
_INDEXED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9")
_TIME_TOLERANCE_S = 1e-3
_SEEK_GAP_S = 5.0
"""Farther apart than this, frames are sought by key frame, not by decoding everything between."""
_MAX_FAILED_SHARE = 0.1
"""A clip of which more packets than this fail to decode is corrupt."""
_DEFAULT_FRAME_S = 1 / 25


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """What to make of one video."""

    preprocessing: Preprocessing
    num_frames: int
    max_pixels: int
    start_s: float | None = None
    """Seconds after the first frame; None: the beginning."""
    end_s: float | None = None
    """Exclusive, seconds after the first frame; None: the end."""
    augmentation: Augmentation = Augmentation()
    augmentation_seed: int | None = None
    """None: no augmentation. One draw serves all frames of the clip."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClipRequest":
        """Rebuild from `to_dict` output or its JSON."""
        low, high = values["augmentation"]["crop_scale"]
        augmentation = Augmentation(**{**values["augmentation"], "crop_scale": (low, high)})
        preprocessing = Preprocessing.from_dict(values["preprocessing"])
        return cls(**{**values, "preprocessing": preprocessing, "augmentation": augmentation})


@dataclass(frozen=True, slots=True)
class _Stream:
    """The video stream as its packets tell it: headers lie about durations and frame counts."""

    index: int
    width: int
    height: int
    starts: NDArray[np.int64]
    """Ascending presentation times of the frames, in the stream's time base."""
    unit_s: float
    """The time base."""
    suits_decord: bool
    """Whether decord can be trusted to find frames: it was measured to return wrong ones, without a word, from
    containers without an index, from h263, and where edit lists hide frames (which `_by_decord` notices)."""

    @property
    def starts_s(self) -> NDArray[np.float64]:
        """Presentation times in seconds after the first frame."""
        return np.asarray((self.starts - self.starts[0]) * self.unit_s, dtype=np.float64)


def read_clip(path: str, request: ClipRequest, use_decord: bool = True) -> NDArray[np.uint8]:
    """Decode uniformly sampled frames: by decord, and by PyAV what decord cannot read.

    Frames are chosen by presentation time, so variable frame rates and non-zero starts do not matter; a clip with
    fewer frames than wanted repeats them. The container's rotation is applied; pixel aspect ratios are not.

    Args:
        path: Local file.
        request: What to make of it.
        use_decord: False after decord crashed on this file.

    Returns:
        uint8 [num_frames, 3, height, width].

    Raises:
        MediaError: If the clip cannot be used.
    """
    try:
        stream = _survey(path, request.max_pixels)
        chosen = _choose(stream.starts_s, request)
        if use_decord and stream.suits_decord:
            with contextlib.suppress(Exception):  # decord's failures have many types; PyAV gives the verdict
                return _by_decord(path, request, stream, chosen)
        return _by_pyav(path, request, stream, chosen)
    except (av.FFmpegError, ValueError) as error:
        raise _media_error(error) from error


def _survey(path: str, max_pixels: int) -> _Stream:
    """Read the header and all packets' times, without decoding a frame."""
    times = []
    with av.open(path, options=_OPEN_OPTIONS) as container:
        stream = next((s for s in container.streams.video if not _is_cover_art(s)), None)
        if stream is None:
            raise MediaError("unsupported", "no video stream")
        # Read all attributes here: they are freed with their container.
        width, height = stream.codec_context.width, stream.codec_context.height
        _check_pixels(width, height, max_pixels)
        for packet in container.demux(stream):
            time = packet.pts if packet.pts is not None else packet.dts
            # Discarded packets (edit lists) are decoded but never shown; empty ones mark the end.
            if packet.size and time is not None and not packet.is_discard:
                times.append(time)
        if not times:
            raise MediaError("corrupt", "the video stream holds no frames")
        starts = np.unique(np.asarray(times, dtype=np.int64))
        unit_s = float(stream.time_base or _DEFAULT_FRAME_S)
        is_indexed = container.format.name in _INDEXED_CONTAINERS
        suits_decord = is_indexed and stream.codec_context.name in _DECORD_CODECS
        return _Stream(stream.index, width, height, starts, unit_s, suits_decord)


def _by_decord(path: str, request: ClipRequest, stream: _Stream, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    import decord

    # One thread: more are no faster on a clip, and each decode worker has its own CPU.
    reader = decord.VideoReader(path, num_threads=1)
    starts_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))), dtype=np.float64)[:, 0]
    is_agreed = len(starts_s) == len(stream.starts)
    if not is_agreed or not np.allclose(starts_s - starts_s[0], stream.starts_s, rtol=0, atol=_TIME_TOLERANCE_S):
        raise MediaError("corrupt", "decord sees other frame times")
    fitter, fitted = _Fitter(request), {}
    for index in np.unique(chosen).tolist():
        frame = reader[index].asnumpy()
        if frame.shape[2] != 3:
            # Measured at widths of 16, 24, 48 and 72: decord takes the padding of its rows for more channels.
            raise MediaError("corrupt", "decord returned padded rows")
        if sorted(frame.shape[:2]) != sorted((stream.width, stream.height)):
            raise MediaError("corrupt", "decord took another video stream")
        fitted[index] = fitter(frame)
    return np.stack([fitted[index] for index in chosen.tolist()])


def _by_pyav(path: str, request: ClipRequest, stream: _Stream, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    fitter, fitted = _Fitter(request), {}
    with av.open(path, options=_OPEN_OPTIONS) as container:
        cursor = _Cursor(container, stream.index, int(stream.starts[0]), int(_SEEK_GAP_S / stream.unit_s))
        for index in np.unique(chosen).tolist():
            fitted[index] = fitter(_upright(cursor.at(int(stream.starts[index]))))
        cursor.require_intact()
    return np.stack([fitted[index] for index in chosen.tolist()])


class _Cursor:
    """Walks forward through a stream; times are in its time base."""

    def __init__(self, container: Any, stream_index: int, first_time: int, seek_gap: int) -> None:
        self._container = container
        self._stream = container.streams[stream_index]
        self._stream.codec_context.thread_count = 1
        self._seek_gap = seek_gap
        self._position = first_time
        self._current: Any = None
        self._ahead: Any = None
        self._num_packets = 0
        self._num_failed = 0
        self._frames = self._decoded()

    def at(self, time: int) -> Any:
        """Return the last frame that starts at or before `time`, or the first there is."""
        if time - self._position > self._seek_gap:
            self._seek(time)
        while self._current is None or self._position < time:
            if self._ahead is None:
                self._ahead = next(self._frames, None)
            if self._ahead is None or (self._current is not None and _time_of(self._ahead) > time):
                break
            self._current, self._ahead = self._ahead, None
            self._position = _time_of(self._current)
        if self._current is None:
            raise MediaError("corrupt", "no frame could be decoded")
        return self._current

    def require_intact(self) -> None:
        """Raise MediaError when too large a share of the packets failed."""
        if self._num_failed > _MAX_FAILED_SHARE * self._num_packets:
            raise MediaError("corrupt", f"{self._num_failed} of {self._num_packets} packets cannot be decoded")

    def _seek(self, time: int) -> None:
        try:
            self._container.seek(time, stream=self._stream)
        except av.FFmpegError:
            return  # not seekable: decode on to it
        self._current = self._ahead = None
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        for packet in self._container.demux(self._stream):
            self._num_packets += 1
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self._num_failed += 1


class _Fitter:
    """Fits a clip's frames, all with the one crop and flip drawn for the clip."""

    def __init__(self, request: ClipRequest) -> None:
        self._request = request
        self._plan: tuple[Box | None, bool] | None = None

    def __call__(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        request = self._request
        height, width = frame_HWC.shape[:2]
        _check_pixels(width, height, request.max_pixels)
        if self._plan is None:
            is_plain = request.augmentation_seed is None
            seed = request.augmentation_seed or 0
            self._plan = (None, False) if is_plain else augment(width, height, request.augmentation, seed)
        return fit(Image.fromarray(frame_HWC), request.preprocessing, *self._plan)


def _choose(starts_s: NDArray[np.float64], request: ClipRequest) -> NDArray[np.int64]:
    """Index of each frame to show; `starts_s` begins at 0."""
    # The last frame is taken to last as long as the others do: containers often do not say.
    last_s = float(np.median(np.diff(starts_s))) if len(starts_s) > 1 else _DEFAULT_FRAME_S
    duration_s = float(starts_s[-1]) + (last_s or _DEFAULT_FRAME_S)
    start_s = request.start_s or 0.0
    end_s = duration_s if request.end_s is None else min(request.end_s, duration_s)
    if not 0 <= start_s < end_s:
        raise MediaError(
            "config", f"start_s={start_s:g} and end_s={end_s:g} leave nothing of a clip of {duration_s:.3f} s"
        )
    return frames_at(uniform_times(start_s, end_s, request.num_frames), starts_s)


def _upright(frame: Any) -> NDArray[np.uint8]:
    """RGB [H, W, 3], turned as the container says (PyAV gives counter-clockwise degrees)."""
    turned = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
    return np.ascontiguousarray(turned, dtype=np.uint8)


def _time_of(frame: Any) -> int:
    return int(frame.pts if frame.pts is not None else frame.dts or 0)


def _is_cover_art(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError("too_large", f"{width}x{height} pixels a frame exceed the limit of {max_pixels}")


def _media_error(error: Exception) -> MediaError:
    if isinstance(error, MemoryError):
        return MediaError("too_large", "decoding needs more memory than video_memory_bytes allows")
    return MediaError("corrupt", f"{type(error).__name__}: {error}")
