"""An HTTP proxy before an object store that fails one request in five: 503, a cut connection, half an answer."""

import contextlib
import http.client
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAILING_EVERY = 5


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: str, counts: Counter) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.counts = urlsplit(upstream).netloc, counts
        self.numbers, self.faults = itertools.count(1), itertools.cycle(("503", "cut", "half"))
        self.lock = threading.Lock()

    def next_fault(self) -> str | None:
        """What goes wrong with the next request."""
        with self.lock:
            fault = next(self.faults) if next(self.numbers) % FAILING_EVERY == 0 else None
            self.counts[fault or "served"] += 1
            return fault

    def handle_error(self, request, client_address) -> None:
        """Clients whose connection was cut hang up in their own ways."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault()
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "cut":
            self._hang_up()
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body=body, headers=dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "half" else content)
            if fault == "half":
                self._hang_up()
        finally:
            upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - the names that the server calls

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def failing_proxy(upstream: str) -> Iterator[tuple[str, Counter]]:
    """Run a proxy; yields its address, and how many requests were served or met which fault so far."""
    counts: Counter = Counter()
    proxy = _Proxy(upstream, counts)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", counts
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
