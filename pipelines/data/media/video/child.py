"""The child process that decodes videos and images: `python -m pipelines.data.media.video.child MEMORY_BYTES`.

It answers requests on its standard input until that closes. It may crash or be killed at any time.
"""

import os
import resource
import signal
import sys
import tempfile
from typing import Any

import numpy as np

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import Clip, ClipRequest, WaveformRequest
from pipelines.data.media.image_clip import decode_image_clip
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.media.video.frames import read_clip
from pipelines.data.media.video.waveform import read_waveform
from pipelines.data.media.video.wire import receive, send

_GRACE_S = 2.0
"""The parent kills the child at the deadline. This much later the child ends itself, in case the parent is gone."""

Reply = tuple[dict[str, Any], *tuple[bytes | memoryview, ...]]


def main() -> None:
    """Serve requests."""
    requests, replies = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    # Decoders print to standard output; that must not mix with the replies.
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 0)
    os.dup2(silence, 1)
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (message := receive(requests)) is not None:
        header, data = message
        signal.setitimer(signal.ITIMER_REAL, header["timeout_s"] + _GRACE_S)
        reply, *payload = _answer(header, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(replies, reply, *payload)


def _answer(header: dict[str, Any], data: bytearray) -> Reply:
    decode = _waveform if header["task"] == "waveform" else _clip
    try:
        if header["task"] == "image":
            return _clip_reply(decode_image_clip(bytes(data), ClipRequest.from_dict(header["request"]), StageCosts()))
        if header["path"] is not None:
            return decode(header["path"], header)
        with tempfile.TemporaryFile() as file:
            # The file has no name, so nothing is left when this process is killed.
            file.write(data)
            file.flush()
            return decode(f"/dev/fd/{file.fileno()}", header)
    except MediaError as error:
        return {"error_class": error.error_class, "message": error.message, "stage": error.stage}, b""
    except MemoryError:
        message = "decoding needs more than video_memory_bytes"
        return {"error_class": "too_large", "message": message, "stage": "decode"}, b""
    except Exception as error:
        return {"error_class": "corrupt", "message": f"{type(error).__name__}: {error}", "stage": "decode"}, b""


def _clip(path: str, header: dict[str, Any]) -> Reply:
    return _clip_reply(read_clip(path, ClipRequest.from_dict(header["request"]), header["backends"]))


def _clip_reply(clip: Clip) -> Reply:
    facts = clip.facts and clip.facts.to_dict()
    reply = {"shape": clip.pixels.shape, "frame_valid": clip.frame_valid.tolist(), "facts": facts}
    if clip.waveforms is None or clip.audio_valid is None:
        return reply, clip.pixels.data.cast("B")
    valid_waveforms = np.ascontiguousarray(clip.waveforms[clip.audio_valid])
    return {**reply, "audio_valid": clip.audio_valid.tolist()}, clip.pixels.data.cast("B"), valid_waveforms.tobytes()


def _waveform(path: str, header: dict[str, Any]) -> Reply:
    samples = read_waveform(path, WaveformRequest(**header["request"]), header["max_pixels"])
    if samples is None:
        return {"has_audio": False}, b""
    return {"has_audio": True}, samples.tobytes()


if __name__ == "__main__":
    main()
