"""Frame times and facts of a video from its packets, without decoding: headers give wrong durations and counts.

Runs only in the child process.
"""

import os
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import MAX_DURATION_S
from pipelines.data.media.facts import MediaFacts
from pipelines.data.media.kinds import SNIFFED_BYTES, sniff_kind
from pipelines.data.schema import IMAGE

# A file may name other files or addresses (playlists, image sequences): only true containers are opened.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,gif,h264,hevc,m4v,obu,ivf"
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_TIMED_CONTAINERS = (MP4, MATROSKA, "flv", "mpegts")
"""Containers that store presentation times. AVI packets have none and get their decode times."""
_INDEXED_BYTES = 256 * 1024**2
"""Size above which an MP4 file is probed by its index, because reading every packet would read the whole file."""
DEFAULT_FRAME_S = 1 / 25


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoProbe:
    """Times and facts of the video stream, from its packets."""

    stream_index: int
    container: str
    codec: str
    width: int
    """Coded width, before rotation."""
    height: int
    starts: NDArray[np.int64]
    """Ascending presentation times of the frames, in the stream's time base."""
    is_key: NDArray[np.bool_]
    """[frames] True where decoding can start."""
    unit_s: float
    """The stream's time base in seconds."""
    has_audio: bool
    is_exact: bool
    """Whether every packet has a presentation time; otherwise `starts` may be wrong by a few frames."""

    @property
    def starts_s(self) -> NDArray[np.float64]:
        """Presentation times in seconds after the first frame."""
        return np.asarray((self.starts - self.starts[0]) * self.unit_s, dtype=np.float64)

    @property
    def duration_s(self) -> float:
        """Time from the first frame to the end of the last, which is assumed to last as long as the others."""
        starts_s = self.starts_s
        gaps_s = np.sort(np.diff(starts_s))
        # The lower median: one long gap in a short clip must not decide the last frame's length.
        last_s = float(gaps_s[(len(gaps_s) - 1) // 2]) if len(gaps_s) else DEFAULT_FRAME_S
        return float(starts_s[-1]) + (last_s or DEFAULT_FRAME_S)

    def facts(self, rotation_deg: int) -> MediaFacts:
        """Facts of the file, with the rotation, which only a decoded frame has."""
        is_turned = rotation_deg % 180 != 0
        span_s = float(self.starts_s[-1])
        return MediaFacts(
            codec=self.codec,
            width=self.height if is_turned else self.width,
            height=self.width if is_turned else self.height,
            num_frames=len(self.starts),
            duration_s=self.duration_s,
            fps=(len(self.starts) - 1) / span_s if span_s > 0 else None,
            rotation_deg=rotation_deg,
            has_audio=self.has_audio,
        )


def open_container(path: str) -> Any:
    """Open a local file with PyAV.

    Raises:
        MediaError: "unsupported" when the content is an image or an unknown format; "corrupt" when it is damaged.
        av.FFmpegError: When the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(SNIFFED_BYTES)
    kind = sniff_kind(head)
    if kind == IMAGE:
        # Decoders would return it as a video of one frame without an error.
        raise MediaError("unsupported", "the content is an image, not a video")
    try:
        return av.open(path, options=_OPEN_OPTIONS)
    except (av.error.InvalidDataError, av.error.DemuxerNotFoundError) as error:
        if kind is None:
            raise MediaError("unsupported", "not a video of a known container") from error
        raise MediaError("corrupt", f"damaged container: {error.strerror}") from error


def probe_video(path: str, max_pixels: int, max_duration_s: float = MAX_DURATION_S) -> VideoProbe:
    """Read the header and all packets' times, without decoding a frame.

    Args:
        path: Local file.
        max_pixels: Limit of width x height.
        max_duration_s: Limit of the duration by the frame times.

    Raises:
        MediaError: If there is no video stream, or its times or sizes make no sense.
        av.FFmpegError: When the file cannot be read.
    """
    with open_container(path) as container:
        stream = next((s for s in container.streams.video if not _is_cover_art(s)), None)
        if stream is None:
            raise MediaError("unsupported", "no video stream")
        # All attributes are read here: they are freed with their container.
        width, height = stream.codec_context.width, stream.codec_context.height
        require_pixel_limit(width, height, max_pixels)
        # Fragmented files have no full index, and edit lists shorten it.
        is_indexed = container.format.name == MP4 and len(stream.index_entries) >= stream.frames > 1
        is_large = os.stat(path).st_size > _INDEXED_BYTES
        times, key_times, is_exact = (_index_times if is_large and is_indexed else _packet_times)(container, stream)
        if not times:
            raise MediaError("corrupt", "the video stream holds no frames")
        starts = np.unique(np.asarray(times, dtype=np.int64))
        unit_s = float(stream.time_base or DEFAULT_FRAME_S)
        found = VideoProbe(
            stream_index=stream.index,
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            width=width,
            height=height,
            starts=starts,
            is_key=np.isin(starts, np.asarray(key_times, dtype=np.int64)),
            unit_s=unit_s,
            has_audio=len(container.streams.audio) > 0,
            is_exact=is_exact and container.format.name in _TIMED_CONTAINERS,
        )
    if found.duration_s > max_duration_s:
        raise MediaError("too_large", f"{found.duration_s:.0f} s exceed the limit of {max_duration_s:.0f} s")
    return found


def require_pixel_limit(width: int, height: int, max_pixels: int) -> None:
    """Raise MediaError ("too_large") when a frame has too many pixels."""
    if width * height > max_pixels:
        raise MediaError("too_large", f"{width}x{height} pixels a frame exceed the limit of {max_pixels}")


def _packet_times(container: Any, stream: Any) -> tuple[list[int], list[int], bool]:
    """Times of the displayed packets, times of the key frames, and whether all are presentation times."""
    times, key_times, is_exact = [], [], True
    for packet in container.demux(stream):
        time = packet.pts
        if time is None:
            time = packet.dts
            is_exact = is_exact and not packet.size
        # Discarded packets (edit lists) are decoded but not displayed; empty packets mark the end.
        if packet.size and time is not None and not packet.is_discard:
            times.append(time)
            if packet.is_keyframe:
                key_times.append(time)
    return times, key_times, is_exact


def _index_times(container: Any, stream: Any) -> tuple[list[int], list[int], bool]:
    """`_packet_times` by the container's index: decode times, shifted by the first packet's delay."""
    first = next(container.demux(stream))
    is_timed = first.pts is not None and first.dts is not None
    delay = first.pts - first.dts if is_timed else 0
    shown = [entry for entry in stream.index_entries if not entry.is_discard]
    times = [entry.timestamp + delay for entry in shown]
    return times, [time for time, entry in zip(times, shown, strict=True) if entry.is_keyframe], False


def _is_cover_art(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
