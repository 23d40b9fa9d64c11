"""Messages between a process and its video child: length-prefixed JSON, then raw bytes. Never pickle."""

import contextlib
import fcntl
import json
import math
import select
import struct
import time
from io import RawIOBase
from typing import Any

_LENGTHS = struct.Struct("<IQ")
_PIPE_BYTES = 1024**2
"""Pipe size that sends a clip in a few pieces instead of one for every 64 KiB; the most without privileges."""
_SET_PIPE_BYTES = getattr(fcntl, "F_SETPIPE_SZ", None)


def enlarge_pipe(stream: RawIOBase) -> None:
    """Enlarge a pipe's buffer where the system allows it."""
    if _SET_PIPE_BYTES is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(stream.fileno(), _SET_PIPE_BYTES, _PIPE_BYTES)


def send(
    stream: RawIOBase, header: dict[str, Any], *payload: bytes | bytearray | memoryview, deadline_s: float = math.inf
) -> None:
    """Write one message.

    Args:
        stream: A pipe; a non-blocking one if there is a deadline.
        header: JSON-ready values.
        payload: Bytes, in any number of parts.
        deadline_s: Deadline by `time.monotonic`.

    Raises:
        OSError: If the other side has ended.
        TimeoutError: If the deadline passes; part of the message may be written.
    """
    encoded = json.dumps(header).encode()
    lengths = _LENGTHS.pack(len(encoded), sum(map(len, payload)))
    for part in (lengths + encoded, *payload):
        rest = memoryview(part)
        while rest:
            _wait(stream, select.POLLOUT, deadline_s)
            rest = rest[stream.write(rest) or 0 :]


def receive(stream: RawIOBase, deadline_s: float = math.inf) -> tuple[dict[str, Any], bytearray] | None:
    """Read one message; None when the other side has ended, also in the middle of one.

    Raises:
        TimeoutError: If the deadline, by `time.monotonic`, passes.
    """
    if (lengths := _read(stream, _LENGTHS.size, deadline_s)) is None:
        return None
    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    encoded = _read(stream, header_bytes, deadline_s)
    payload = _read(stream, payload_bytes, deadline_s)
    return None if encoded is None or payload is None else (json.loads(encoded), payload)


def _read(stream: RawIOBase, size: int, deadline_s: float) -> bytearray | None:
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        _wait(stream, select.POLLIN, deadline_s)
        count = stream.readinto(rest)
        if count == 0:
            return None
        rest = rest[count or 0 :]
    return content


def _wait(stream: RawIOBase, event: int, deadline_s: float) -> None:
    """Wait until the stream is ready; without a deadline, the read or write itself blocks."""
    if deadline_s == math.inf:
        return
    poller = select.poll()
    poller.register(stream, event)
    if not poller.poll(1000 * max(0.0, deadline_s - time.monotonic())):
        raise TimeoutError
