"""How a parent process and its video child talk: length-prefixed JSON, then raw bytes. Never pickle."""

import contextlib
import fcntl
import json
import struct
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("<IQ")
_PIPE_BYTES = 1024**2
"""A clip passes in a few pieces instead of one for every 64 KiB; unprivileged processes may have no more."""
_SET_PIPE_BYTES = getattr(fcntl, "F_SETPIPE_SZ", None)


def widen(stream: BinaryIO) -> None:
    """Let a pipe hold more, where the system allows it."""
    if _SET_PIPE_BYTES is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(stream.fileno(), _SET_PIPE_BYTES, _PIPE_BYTES)


def send(stream: BinaryIO, header: dict[str, Any], *payload: bytes | memoryview) -> None:
    """Write one message, whose payload may come in parts, and flush it.

    Raises:
        OSError: If the other side is gone.
    """
    encoded = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(encoded), sum(map(len, payload))))
    stream.write(encoded)
    for part in payload:
        stream.write(part)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read one message; None when the other side has ended, also in the middle of one."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    encoded, payload = stream.read(header_bytes), stream.read(payload_bytes)
    if len(encoded) < header_bytes or len(payload) < payload_bytes:
        return None
    return json.loads(encoded), payload
