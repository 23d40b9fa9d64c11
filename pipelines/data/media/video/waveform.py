"""The sound of a video as one waveform. Runs only in the child process."""

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import WaveformRequest
from pipelines.data.media.video.audio_track import AudioTrack
from pipelines.data.media.video.frames import media_error
from pipelines.data.media.video.probe import open_container, probe_video


def read_waveform(path: str, request: WaveformRequest, max_pixels: int) -> NDArray[np.float32] | None:
    """Decode the first audio track to mono, the mean of its channels.

    Time zero is the first video frame, so that clip bounds mean the same for sound and frames (in a file without video
    it is the first sound). Where the sound starts after the requested part, or has gaps, the waveform is silent; where
    it ends earlier, the waveform is shorter.

    Args:
        path: Local file.
        request: Sample rate and part.
        max_pixels: Limit of width x height of the video frames.

    Returns:
        float32 [samples] within [-1, 1], or None when there is no audio track.

    Raises:
        MediaError: If the sound cannot be used.
    """
    start_s, end_s = request.start_s or 0.0, request.end_s
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        raise MediaError("config", f"start_s={start_s:g} and end_s={end_s} leave no sound", stage="manifest")
    try:
        with open_container(path) as container:
            if not container.streams.audio:
                return None
            has_video = len(container.streams.video) > 0
        zero_s = None
        if has_video:
            found = probe_video(path, max_pixels, request.max_duration_s)
            zero_s = float(found.starts[0]) * found.unit_s
        num_samples = None if end_s is None else round((end_s - start_s) * request.sample_rate_hz)
        with open_container(path) as container:
            audio = AudioTrack(container, request.sample_rate_hz, zero_s)
            if start_s > 0:
                audio.seek(start_s)
            waveform = audio.read(start_s, num_samples)
            audio.require_decodable()
            return waveform.waveform()
    except (av.FFmpegError, OSError, ValueError) as error:
        raise media_error(error) from error
