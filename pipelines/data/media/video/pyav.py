"""PyAV backend: decodes what the wanted frames need, and nothing else."""

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
"""Decoders that can leave out, packet by packet, frames that no other frame refers to."""
_MIN_JUMP_FRAMES = 4
"""Fewer frames than this before the next key frame are decoded: a jump loses those in the decoder's queue."""
_MIN_SEEK_FRAMES = 256
"""Fewer packets than this are read and dropped; a seek costs as much and may miss."""
_MAX_FAILED_SHARE = 0.1
"""A clip of which more packets or more wanted frames than this fail to decode is corrupt."""
_INTERPOLATION = {"nearest": "POINT", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS"}


class PyAVBackend:
    """Frames by PyAV, of every codec that FFmpeg has."""

    name = "pyav"

    def suits(self, survey: VideoProbe) -> bool:
        """It is worth a try with anything that PyAV could survey."""
        return True

    def frames_at(
        self, path: str, survey: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """See `video_backends.VideoBackend`.

        First only what the wanted frames refer to is decoded. Where that does not give every wanted frame (damage,
        key frames that are none) all is decoded from the beginning, and each wanted time gets the frame that a
        player shows then.
        """
        painter = _FrameConverter(size_of, filter_name)
        num_done = 0
        if survey.is_exact:
            with contextlib.suppress(av.FFmpegError):
                for index, frame in _selected(path, survey, indexes):
                    yield index, painter.rgb(frame)
                    num_done += 1
        if num_done < len(indexes):
            for index, frame in _shown(path, survey, indexes):
                yield index, painter.rgb(frame)


def rotation_of(path: str, survey: VideoProbe) -> int:
    """Clockwise turn in degrees that a player applies, read off the first frame that decodes."""
    with open_container(path) as container:
        cursor = _Cursor(container, survey)
        frame = cursor.at(int(survey.starts[0]))
        return 0 if frame is None else _clockwise(frame)


def _selected(path: str, survey: VideoProbe, indexes: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """The wanted frames by their exact times; ends early when one does not come."""
    keys = np.concatenate([[0], np.flatnonzero(survey.is_key)])
    # The key frame that decoding of each wanted frame has to begin at, and how far that is from the one before.
    starting = keys[np.searchsorted(keys, indexes, side="right") - 1]
    skipped = starting - np.concatenate([[0], indexes[:-1]])
    with open_container(path) as container:
        wanted = set(survey.starts[indexes].tolist())
        # After these nothing more is wanted of what the decoder holds.
        last_of_run = np.concatenate([skipped[1:] > _MIN_JUMP_FRAMES, [True]])
        final = set(survey.starts[indexes[last_of_run]].tolist())
        cursor = _Cursor(container, survey, wanted if survey.codec in _SKIPPING_CODECS else None, final)
        for index, key, distance in zip(indexes.tolist(), starting.tolist(), skipped.tolist(), strict=True):
            if distance > _MIN_JUMP_FRAMES:
                cursor.jump(int(survey.starts[key]), is_far=distance > _MIN_SEEK_FRAMES)
            frame = cursor.at(int(survey.starts[index]))
            if frame is None or _time_of(frame) != survey.starts[index] or cursor.num_failed:
                return
            yield index, frame


def _shown(path: str, survey: VideoProbe, indexes: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """For each wanted frame the last that decodes at or before its time, or the first there is.

    Raises:
        MediaError: If too little can be decoded.
    """
    keys = np.flatnonzero(survey.is_key)
    num_missing, position = 0, 0
    with open_container(path) as container:
        cursor = _Cursor(container, survey)
        for index in indexes.tolist():
            before = int(np.searchsorted(keys, index, side="right")) - 1
            if not survey.is_exact and before >= 0 and keys[before] - position > _MIN_SEEK_FRAMES:
                cursor.seek(int(survey.starts[keys[before]]))
            position = index
            frame = cursor.at(int(survey.starts[index]))
            if frame is None:
                raise MediaError("corrupt", "no frame could be decoded")
            num_missing += survey.is_exact and _time_of(frame) != survey.starts[index]
            yield index, frame
        if cursor.num_failed > _MAX_FAILED_SHARE * cursor.num_packets:
            raise MediaError("corrupt", f"{cursor.num_failed} of {cursor.num_packets} packets cannot be decoded")
    if num_missing > _MAX_FAILED_SHARE * len(indexes):
        raise MediaError("corrupt", f"{num_missing} of the {len(indexes)} wanted frames cannot be decoded")


class _Cursor:
    """Walks forward through a stream; times are in its time base.

    Args:
        container: Open file.
        survey: Of the file.
        wanted: Times of the frames to decode; others are left out where nothing refers to them. None decodes all.
        final: Times of frames after which nothing is wanted but by a jump: they are had at once from the decoder,
            which else gives a frame only when it has seen some more.
    """

    def __init__(
        self, container: Any, survey: VideoProbe, wanted: set[int] | None = None, final: Collection[int] = ()
    ) -> None:
        self._container, self._wanted, self._final = container, wanted, final
        self._stream = container.streams[survey.stream_index]
        # One thread: more are hardly faster on a clip, and each decode worker has its own CPU.
        self._stream.codec_context.thread_count = 1
        self._packets: Iterator[Any] = container.demux(self._stream)
        self._frames = self._decoded()
        self._current: Any = None
        self._ahead: Any = None
        self.num_packets = 0
        self.num_failed = 0

    def at(self, time: int) -> Any:
        """Return the last frame that starts at or before `time`, or the first there is; None when there is none."""
        while self._current is None or _time_of(self._current) < time:
            if self._ahead is None:
                self._ahead = next(self._frames, None)
            if self._ahead is None or (self._current is not None and _time_of(self._ahead) > time):
                break
            self._current, self._ahead = self._ahead, None
        return self._current

    def jump(self, key_time: int, *, is_far: bool) -> None:
        """Go on at the key frame of that time, over what lies between."""
        if is_far:
            self.seek(key_time)
        self._packets = itertools.dropwhile(lambda p: p.pts != key_time or not p.is_keyframe, self._packets)
        self._stream.codec_context.flush_buffers()
        self._restart()

    def seek(self, time: int) -> None:
        """Go on at the last key frame before `time`, where the container can be sought in."""
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
                left_out = "DEFAULT" if packet.pts in self._wanted or not packet.size else "NONREF"
                if left_out != skipped:
                    context.skip_frame = skipped = left_out
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
    """Makes upright RGB [H, W, 3] of decoded frames, scaled where that is asked for.

    swscale scales together with the conversion, measured at 0.4 ms for a 640x360 frame to 398x224, against 1.3 ms for
    converting and Pillow's bicubic; pixels differ by 1.2 levels in the mean. Planar RGB is what it is fastest at, the
    layout that the encoder wants, and more exact: packed RGB has its colours at half the width, and rounds down. But
    without scaling, planar RGB of some widths has garbage in the last columns (66 pixels, FFmpeg 8.1).
    """

    def __init__(self, size_of: SizeOf | None, filter_name: str) -> None:
        self._size_of, self._interpolation = size_of, _INTERPOLATION[filter_name]
        self._reformatter: Any = VideoReformatter()

    def rgb(self, frame: Any) -> NDArray[np.uint8]:
        turn = _clockwise(frame)
        width, height = own = (frame.width, frame.height)
        if self._size_of is not None:
            # Scaled before the turn.
            width, height = self._size_of(width, height) if turn % 180 == 0 else self._size_of(height, width)[::-1]
        if (width, height) == own:
            return np.rot90(frame.to_ndarray(format="rgb24"), k=-turn // 90)
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="gbrp", interpolation=self._interpolation, threads=1
        )
        planes = [np.frombuffer(scaled.planes[at], dtype=np.uint8).reshape(height, -1) for at in (2, 0, 1)]
        return np.rot90(np.stack([plane[:, :width] for plane in planes]).transpose(1, 2, 0), k=-turn // 90)


def _clockwise(frame: Any) -> int:
    # PyAV gives counter-clockwise degrees.
    return round(-frame.rotation / 90) * 90 % 360


def _time_of(frame: Any) -> int:
    return int(frame.pts if frame.pts is not None else frame.dts or 0)
