"""Clients that speak HTTP badly, slowly, or hang up: on plain sockets, as no library would do it."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

NO_HTTP = (
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad header\r\n\r\n",
)
"""Each is answered with a 4xx or a closed connection."""


def answer_to(url: str, request: bytes, timeout_s: float = 10.0) -> bytes:
    """The first line of what the server says to some bytes; empty when it hangs up."""
    with _connected(url, timeout_s) as client:
        with contextlib.suppress(OSError):  # it may hang up before it has read everything
            client.sendall(request)
        with contextlib.suppress(OSError):
            return client.recv(4096).split(b"\r\n")[0]
    return b""


def hang_up_early(url: str, path: str, body: bytes, share: float) -> None:
    """Send a part of a request's body and leave."""
    with _connected(url) as client:
        client.sendall(_head(path, len(body)) + body[: int(len(body) * share)])


def hang_up_in_stream(url: str, path: str, body: bytes) -> bytes:
    """Ask for a stream, read its beginning and leave; returns what was read."""
    with _connected(url, 60.0) as client:
        client.sendall(_head(path, len(body)) + body)
        read = b""
        while b"data:" not in read:
            piece = client.recv(4096)
            if not piece:
                break
            read += piece
        return read


@contextmanager
def dawdlers(url: str, path: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections whose requests never come to an end: half with a head that stops, half with a body that does."""
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(count):
            client = stack.enter_context(_connected(url))
            client.sendall(b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nX-A:" if number % 2 else _head(path, 1000) + b"{")
            clients.append(client)
        yield clients


def trickle(client: socket.socket, seconds: float) -> bytes:
    """Send a byte now and then until the server answers; returns the first line of the answer."""
    client.settimeout(0.5)
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        try:
            client.sendall(b" ")
            return client.recv(4096).split(b"\r\n")[0]
        except TimeoutError:
            continue
        except OSError:
            return b""
    raise AssertionError(f"no answer to a trickle of {seconds} s")


def chat(content: object, **fields: object) -> bytes:
    """The body of a chat."""
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def _connected(url: str, timeout_s: float = 10.0) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=timeout_s)
