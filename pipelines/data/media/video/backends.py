"""Libraries that decode video frames, behind one interface, and the order in which they are tried.

The order (`clip.BACKEND_NAMES`) was measured: CPU milliseconds for 8 uniform frames of 10 s of 640x360 H.264 to 224
pixels, least of 22 interleaved runs with one thread on one busy core, GOP 30 and 250. PyAV with what `video_pyav`
leaves out 63 and 81; TorchCodec 0.12 on the same FFmpeg 8 71 and 105, and seconds to load it; decord 0.6 85 and 101.

The survey (by PyAV, without decoding) is the authority on what frames there are, and when: a backend that sees others
is not believed.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.data.media.clip import SizeOf
from pipelines.data.media.video.probe import MATROSKA, MP4, VideoProbe
from pipelines.data.media.video.pyav import PyAVBackend

_INDEXED = (MP4, MATROSKA)
"""Containers that say where decoding can begin."""
_DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9")
_TIME_TOLERANCE_S = 1e-3


class BackendError(Exception):
    """This backend cannot be used on this file; another may."""


class VideoBackend(Protocol):
    """One decoding library."""

    name: str

    def suits(self, survey: VideoProbe) -> bool:
        """Whether it is installed and can be trusted with such a file."""

    def frames_at(
        self, path: str, survey: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Decode frames.

        Args:
            path: Local file.
            survey: Of the file.
            indexes: Frames in the order of `survey.starts`, ascending and unique.
            size_of: From a frame's shown width and height to those that the backend may scale it to; None: as it is.
            filter_name: Interpolation of the scaling, as in `Preprocessing`.

        Yields:
            Index and RGB frame [H, W, 3], upright. Where an index comes twice, the last counts.

        Raises:
            MediaError: A verdict on the file: no other backend is asked.
            Exception: Any other failure; the next backend is tried.
        """


class DecordBackend:
    """Frames by decord, where its frame times can be checked.

    It was measured to return wrong frames, without a word, from containers without an index, from h263, and where
    edit lists hide frames.
    """

    name = "decord"

    def suits(self, survey: VideoProbe) -> bool:
        """See `VideoBackend`."""
        is_known = survey.container in _INDEXED and survey.codec in _DECORD_CODECS
        return is_known and survey.is_exact and importlib.util.find_spec("decord") is not None

    def frames_at(
        self, path: str, survey: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """See `VideoBackend`; does not scale."""
        import decord

        # One thread: more are no faster on a clip, and each decode worker has its own CPU.
        reader = decord.VideoReader(path, num_threads=1)
        starts_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))), dtype=np.float64)[:, 0]
        _require_same_times(starts_s, survey)
        for index in indexes.tolist():
            frame = reader[index].asnumpy()
            if frame.shape[2] != 3:
                # Measured at widths of 16, 24, 48 and 72: decord takes the padding of its rows for more channels.
                raise BackendError("decord returned padded rows")
            yield index, _checked(frame, survey)


class TorchCodecBackend:
    """Frames by TorchCodec, where it and its FFmpeg are installed. Loading it takes seconds, for it loads torch.

    Of an MPEG transport stream, which has no index, 0.13 was measured to show frames at the right times that it had
    decoded without the key frame before them.
    """

    name = "torchcodec"

    def suits(self, survey: VideoProbe) -> bool:
        """See `VideoBackend`. Whether its FFmpeg is there shows only when it is used."""
        is_known = survey.container in _INDEXED and survey.is_exact
        return is_known and importlib.util.find_spec("torchcodec") is not None

    def frames_at(
        self, path: str, survey: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """See `VideoBackend`; does not scale."""
        decoders: Any = importlib.import_module("torchcodec.decoders")
        decoder = decoders.VideoDecoder(
            path, stream_index=survey.stream_index, dimension_order="NHWC", num_ffmpeg_threads=1
        )
        batch = decoder.get_frames_at(indexes.tolist())
        starts_s = batch.pts_seconds.numpy() - float(survey.starts[0]) * survey.unit_s
        if not np.allclose(starts_s, survey.starts_s[indexes], rtol=0, atol=_TIME_TOLERANCE_S):
            raise BackendError("torchcodec sees other frame times")
        for index, frame in zip(indexes.tolist(), batch.data.numpy(), strict=True):
            yield index, _checked(frame, survey)


BACKENDS: Final[dict[str, VideoBackend]] = {
    backend.name: backend for backend in (PyAVBackend(), DecordBackend(), TorchCodecBackend())
}


def _require_same_times(starts_s: NDArray[np.float64], survey: VideoProbe) -> None:
    is_agreed = len(starts_s) == len(survey.starts)
    if not is_agreed or not np.allclose(starts_s - starts_s[0], survey.starts_s, rtol=0, atol=_TIME_TOLERANCE_S):
        raise BackendError("the backend sees other frame times")


def _checked(frame_HWC: NDArray[np.uint8], survey: VideoProbe) -> NDArray[np.uint8]:
    if sorted(frame_HWC.shape[:2]) != sorted((survey.width, survey.height)):
        raise BackendError("the backend took another video stream")
    return np.ascontiguousarray(frame_HWC)
