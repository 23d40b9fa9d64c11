"""The child process that decodes videos: `python -m pipelines.data.video_child MEMORY_BYTES`.

Answers requests on its standard input until that closes. It may crash or be killed at any moment.
"""

import os
import resource
import signal
import sys
import tempfile
from typing import Any

from pipelines.data.media import MediaError
from pipelines.data.video import ClipRequest, read_clip
from pipelines.data.video_wire import receive, send

_GRACE_S = 2.0
"""The parent kills at the deadline; this much later the child ends itself, should the parent be gone."""


def main() -> None:
    """Serve requests."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Decoders print; their words must not get between the replies.
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 0)
    os.dup2(silence, 1)
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (message := receive(requests)) is not None:
        header, data = message
        signal.setitimer(signal.ITIMER_REAL, header["timeout_s"] + _GRACE_S)
        reply, payload = _answer(header, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(replies, reply, payload)


def _answer(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    request = ClipRequest.from_dict(header["request"])
    try:
        if header["path"] is not None:
            clip = read_clip(header["path"], request, header["use_decord"])
        else:
            with tempfile.TemporaryFile() as file:
                # Unlinked already, so that nothing stays behind when this process is killed.
                file.write(data)
                file.flush()
                clip = read_clip(f"/dev/fd/{file.fileno()}", request, header["use_decord"])
    except MediaError as error:
        return {"error_class": error.error_class, "message": error.message}, b""
    except MemoryError:
        return {"error_class": "too_large", "message": "decoding needs more than video_memory_bytes"}, b""
    except Exception as error:
        return {"error_class": "corrupt", "message": f"{type(error).__name__}: {error}"}, b""
    return {"shape": clip.shape}, clip.data.cast("B")


if __name__ == "__main__":
    main()
