"""Video decoding libraries behind one interface, and the order in which they are tried.

The order (`clip.BACKEND_NAMES`) was measured: CPU milliseconds for 8 uniform frames of 10 s of 640x360 H.264 to 224
pixels, minimum of 22 interleaved runs with one thread on one busy core, GOP 30 and 250. PyAV takes 63 and 81;
TorchCodec 0.12 on the same FFmpeg 8 takes 71 and 105, and seconds to load; decord 0.6 takes 85 and 101.

The probe (by PyAV, without decoding) decides which frames exist, and when: a backend that reports other frames is
rejected.
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
"""Containers with an index of the positions where decoding can start."""
_DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9")
_TIME_TOLERANCE_S = 1e-3


class BackendError(Exception):
    """This backend cannot decode this file; another may."""


class VideoBackend(Protocol):
    """One decoding library."""

    name: str

    def supports(self, probe: VideoProbe) -> bool:
        """Whether it is installed and decodes such a file correctly."""

    def frames_at(
        self, path: str, probe: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Decode frames.

        Args:
            path: Local file.
            probe: Probe of the file.
            indexes: Indexes into `probe.starts`, ascending and unique.
            size_of: Size that the backend may scale a frame to; None: no scaling.
            filter_name: Interpolation of the scaling, as in `Preprocessing`.

        Yields:
            Index and upright RGB frame [H, W, 3]. Where an index is repeated, the last frame counts.

        Raises:
            MediaError: If the file itself is at fault; no other backend is tried.
            Exception: Any other failure; the next backend is tried.
        """


class DecordBackend:
    """Frames by decord, where its frame times can be checked.

    It was measured to return wrong frames without an error from containers without an index, from h263, and where edit
    lists hide frames.
    """

    name = "decord"

    def supports(self, probe: VideoProbe) -> bool:
        """See `VideoBackend`."""
        is_known = probe.container in _INDEXED and probe.codec in _DECORD_CODECS
        return is_known and probe.is_exact and importlib.util.find_spec("decord") is not None

    def frames_at(
        self, path: str, probe: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """See `VideoBackend`; does not scale."""
        import decord

        # One thread, because more are no faster on a clip and each decode worker has its own CPU.
        reader = decord.VideoReader(path, num_threads=1)
        starts_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))), dtype=np.float64)[:, 0]
        _require_same_times(starts_s, probe)
        for index in indexes.tolist():
            frame = reader[index].asnumpy()
            if frame.shape[2] != 3:
                # Measured at widths of 16, 24, 48 and 72: decord returns the padding of its rows as channels.
                raise BackendError("decord returned padded rows")
            yield index, _checked(frame, probe)


class TorchCodecBackend:
    """Frames by TorchCodec, where it and its FFmpeg are installed. Loading it takes seconds, because it loads torch.

    From an MPEG transport stream, which has no index, 0.13 was measured to return frames at the right times that were
    decoded without the key frame before them.
    """

    name = "torchcodec"

    def supports(self, probe: VideoProbe) -> bool:
        """See `VideoBackend`. A missing FFmpeg shows only in use."""
        is_known = probe.container in _INDEXED and probe.is_exact
        return is_known and importlib.util.find_spec("torchcodec") is not None

    def frames_at(
        self, path: str, probe: VideoProbe, indexes: NDArray[np.int64], size_of: SizeOf | None, filter_name: str
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """See `VideoBackend`; does not scale."""
        decoders: Any = importlib.import_module("torchcodec.decoders")
        decoder = decoders.VideoDecoder(
            path, stream_index=probe.stream_index, dimension_order="NHWC", num_ffmpeg_threads=1
        )
        batch = decoder.get_frames_at(indexes.tolist())
        starts_s = batch.pts_seconds.numpy() - float(probe.starts[0]) * probe.unit_s
        if not np.allclose(starts_s, probe.starts_s[indexes], rtol=0, atol=_TIME_TOLERANCE_S):
            raise BackendError("torchcodec reports other frame times")
        for index, frame in zip(indexes.tolist(), batch.data.numpy(), strict=True):
            yield index, _checked(frame, probe)


BACKENDS: Final[dict[str, VideoBackend]] = {
    backend.name: backend for backend in (PyAVBackend(), DecordBackend(), TorchCodecBackend())
}


def _require_same_times(starts_s: NDArray[np.float64], probe: VideoProbe) -> None:
    is_same_count = len(starts_s) == len(probe.starts)
    if not is_same_count or not np.allclose(starts_s - starts_s[0], probe.starts_s, rtol=0, atol=_TIME_TOLERANCE_S):
        raise BackendError("the backend reports other frame times")


def _checked(frame_HWC: NDArray[np.uint8], probe: VideoProbe) -> NDArray[np.uint8]:
    if sorted(frame_HWC.shape[:2]) != sorted((probe.width, probe.height)):
        raise BackendError("the backend decoded another video stream")
    return np.ascontiguousarray(frame_HWC)
