"""PyAV backend: decodes only the packets that the requested frames need."""

import contextlib
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import SizeOf
from pipelines.data.media.video.probe import VideoProbe, open_container

_SKIPPING_CODECS = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8")
"""Decoders that can skip, packet by packet, frames that no other frame refers to."""
_MIN_JUMP_FRAMES = 4
"""Fewer frames than this before the next key frame are decoded, because a jump loses frames in the decoder's queue."""
_MIN_SEEK_FRAMES = 256
"""Fewer packets than this are read and dropped; a seek costs as much and may be inexact."""
_MAX_FAILED_SHARE = 0.1
"""A clip is corrupt if a larger share of its packets or of the requested frames fails to decode."""
_INTERPOLATION = {"nearest": "POINT", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS"}


class PyAVBackend:
    """Frames by PyAV, for every codec of FFmpeg."""

    name = "pyav"

    def supports(self, probe: VideoProbe) -> bool:
        """True: whatever PyAV could probe, it may decode."""
        return True

    def frames_at(
        self, path: str, probe: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """See `backends.VideoBackend`.

        First, only the packets that the requested frames refer to are decoded. Where that does not give every frame
        (damage, wrong key frame flags), all packets are decoded from the start, and each requested time gets the frame
        that a player shows then.
        """
        converter = _FrameConverter(size_of, filter_name)
        num_done = 0
        if probe.is_exact:
            with contextlib.suppress(av.FFmpegError):
                for index, frame in _exact_frames(path, probe, indexes):
                    yield index, converter.rgb(frame)
                    num_done += 1
        if num_done < len(indexes):
            for index, frame in _displayed_frames(path, probe, indexes):
                yield index, converter.rgb(frame)


def rotation_of(path: str, probe: VideoProbe) -> int:
    """Clockwise turn in degrees that a player applies, read off the first frame that decodes."""
    with open_container(path) as container:
        cursor = _Cursor(container, probe)
        frame = cursor.at(int(probe.starts[0]))
        return 0 if frame is None else _clockwise(frame)


def _exact_frames(path: str, probe: VideoProbe, indexes: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Yield the requested frames by their exact times; stop at the first that is missing."""
    keys = np.concatenate([[0], np.flatnonzero(probe.is_key)])
    # The key frame at which decoding of each requested frame starts, and its distance from the previous frame.
    starting = keys[np.searchsorted(keys, indexes, side="right") - 1]
    skipped = starting - np.concatenate([[0], indexes[:-1]])
    with open_container(path) as container:
        wanted = set(probe.starts[indexes].tolist())
        # After these, no frame in the decoder's queue is requested.
        last_of_run = np.concatenate([skipped[1:] > _MIN_JUMP_FRAMES, [True]])
        final = set(probe.starts[indexes[last_of_run]].tolist())
        cursor = _Cursor(container, probe, wanted if probe.codec in _SKIPPING_CODECS else None, final)
        for index, key, distance in zip(indexes.tolist(), starting.tolist(), skipped.tolist(), strict=True):
            if distance > _MIN_JUMP_FRAMES:
                cursor.jump(int(probe.starts[key]), is_far=distance > _MIN_SEEK_FRAMES)
            frame = cursor.at(int(probe.starts[index]))
            if frame is None or _time_of(frame) != probe.starts[index] or cursor.num_failed:
                return
            yield index, frame


def _displayed_frames(path: str, probe: VideoProbe, indexes: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Yield for each requested frame the last that decodes at or before its time, or the first of all.

    Raises:
        MediaError: If too little can be decoded.
    """
    keys = np.flatnonzero(probe.is_key)
    num_missing, position = 0, 0
    with open_container(path) as container:
        cursor = _Cursor(container, probe)
        for index in indexes.tolist():
            before = int(np.searchsorted(keys, index, side="right")) - 1
            if not probe.is_exact and before >= 0 and keys[before] - position > _MIN_SEEK_FRAMES:
                cursor.seek(int(probe.starts[keys[before]]))
            position = index
            frame = cursor.at(int(probe.starts[index]))
            if frame is None:
                raise MediaError("corrupt", "no frame could be decoded")
            num_missing += probe.is_exact and _time_of(frame) != probe.starts[index]
            yield index, frame
        if cursor.num_failed > _MAX_FAILED_SHARE * cursor.num_packets:
            raise MediaError("corrupt", f"{cursor.num_failed} of {cursor.num_packets} packets cannot be decoded")
    if num_missing > _MAX_FAILED_SHARE * len(indexes):
        raise MediaError("corrupt", f"{num_missing} of the {len(indexes)} requested frames cannot be decoded")


class _Cursor:
    """Reads forward through a stream; times are in its time base.

    Args:
        container: Open file.
        probe: Probe of the file.
        wanted: Times of the frames to decode; others are skipped where no frame refers to them. None decodes all.
        final: Times of frames that are followed by a jump or the end: the decoder is flushed there, because it would
            otherwise return a frame only after more packets.
    """

    def __init__(
        self, container: Any, probe: VideoProbe, wanted: set[int] | None = None, final: Collection[int] = ()
    ) -> None:
        self._container, self._wanted, self._final = container, wanted, final
        self._stream = container.streams[probe.stream_index]
        # One thread, because more are hardly faster on a clip and each decode worker has its own CPU.
        self._stream.codec_context.thread_count = 1
        self._packets: Iterator[Any] = container.demux(self._stream)
        self._frames = self._decoded()
        self._current: Any = None
        self._ahead: Any = None
        self.num_packets = 0
        self.num_failed = 0

    def at(self, time: int) -> Any:
        """Return the last frame that starts at or before `time`, or the first of all; None when there is none."""
        while self._current is None or _time_of(self._current) < time:
            if self._ahead is None:
                self._ahead = next(self._frames, None)
            if self._ahead is None or (self._current is not None and _time_of(self._ahead) > time):
                break
            self._current, self._ahead = self._ahead, None
        return self._current

    def jump(self, key_time: int, *, is_far: bool) -> None:
        """Continue at the key frame of that time, skipping the packets between."""
        if is_far:
            self.seek(key_time)
        self._packets = itertools.dropwhile(lambda p: p.pts != key_time or not p.is_keyframe, self._packets)
        self._stream.codec_context.flush_buffers()
        self._restart()

    def seek(self, time: int) -> None:
        """Continue at the last key frame before `time`, where the container can seek."""
        with contextlib.suppress(av.FFmpegError):
            self._container.seek(time, stream=self._stream)
            self._packets = self._container.demux(self._stream)
            self._restart()

    def _restart(self) -> None:
        self._current = self._ahead = None
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        context, skipped = self._stream.codec_context, "DEFAULT"
        for packet in self._packets:
            self.num_packets += 1
            if self._wanted is not None:
                skip = "DEFAULT" if packet.pts in self._wanted or not packet.size else "NONREF"
                if skip != skipped:
                    context.skip_frame = skipped = skip
            try:
                yield from packet.decode()
                if packet.pts in self._final:
                    yield from context.decode(None)
                    return
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self.num_failed += 1


class _FrameConverter:
    """Converts decoded frames to upright RGB [H, W, 3], scaled if requested.

    swscale scales in the same pass as the conversion, measured at 0.4 ms for a 640x360 frame to 398x224, against 1.3 ms
    for conversion and Pillow's bicubic; pixels differ by 1.2 levels in the mean. Planar RGB is its fastest output, the
    encoder's layout, and more exact: packed RGB has its colours at half the width, and rounds down. But without
    scaling, planar RGB of some widths has garbage in the last columns (66 pixels, FFmpeg 8.1).
    """

    def __init__(self, size_of: SizeOf | None, filter_name: str) -> None:
        self._size_of, self._interpolation = size_of, _INTERPOLATION[filter_name]
        self._reformatter: Any = VideoReformatter()

    def rgb(self, frame: Any) -> NDArray[np.uint8]:
        turn = _clockwise(frame)
        width, height = own = (frame.width, frame.height)
        if self._size_of is not None:
            # Scaling comes before the rotation.
            width, height = self._size_of(width, height) if turn % 180 == 0 else self._size_of(height, width)[::-1]
        if (width, height) == own:
            return np.rot90(frame.to_ndarray(format="rgb24"), k=-turn // 90)
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="gbrp", interpolation=self._interpolation, threads=1
        )
        planes = [np.frombuffer(scaled.planes[at], dtype=np.uint8).reshape(height, -1) for at in (2, 0, 1)]
        return np.rot90(np.stack([plane[:, :width] for plane in planes]).transpose(1, 2, 0), k=-turn // 90)


def _clockwise(frame: Any) -> int:
    # PyAV reports counter-clockwise degrees.
    return round(-frame.rotation / 90) * 90 % 360


def _time_of(frame: Any) -> int:
    return int(frame.pts if frame.pts is not None else frame.dts or 0)
