"""Decode videos in child processes that are killed at a deadline and replaced when they crash."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.data.media import MediaError
from pipelines.data.video import ClipRequest
from pipelines.data.video_wire import receive, send

# The child decodes strangers' files: it gets what it needs to run, and no credentials.
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")


class VideoPool:
    """A few decoding children, started when first needed and reused while healthy. Thread-safe.

    Args:
        timeout_s: Deadline of one clip; its child is killed then.
        memory_bytes: Address space a child may use.
        size: Number of children, the clips that can be decoded at a time.
    """

    def __init__(self, *, timeout_s: float, memory_bytes: int, size: int = 1) -> None:
        self._timeout_s = timeout_s
        self._children = [_Child(memory_bytes) for _ in range(size)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def read_clip(self, request: ClipRequest, *, path: str | None = None, data: bytes = b"") -> NDArray[np.uint8]:
        """Decode sampled frames of one clip.

        A crash is tried once more without decord, the decoder that is known to crash.

        Args:
            request: What to make of it.
            path: Local file; None to decode `data`.
            data: The file's content.

        Returns:
            uint8 [num_frames, 3, height, width].

        Raises:
            MediaError: If the clip cannot be used, takes too long, or kills its decoder twice.
        """
        header = {"request": request.to_dict(), "path": path, "timeout_s": self._timeout_s}
        child = self._idle.get()
        try:
            for use_decord in (True, False):
                reply = child.ask({**header, "use_decord": use_decord}, data, self._timeout_s)
                if reply is not None:
                    return _unpack(*reply)
        finally:
            self._idle.put(child)
        raise MediaError("corrupt", "the decoder crashed twice on this file", tries=2)

    def child_pids(self) -> list[int]:
        """Process ids of the living children."""
        return [child.pid for child in self._children if child.pid is not None]

    def close(self) -> None:
        """End the children. A later request starts new ones."""
        for child in self._children:
            child.kill()


class _Child:
    """One decoding process, or none yet."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def ask(self, header: dict[str, Any], data: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes] | None:
        """Send a request and wait for its reply; None when the child died of it.

        Raises:
            MediaError: "timeout".
        """
        if self._process is not None and self._process.poll() is not None:
            self.kill()  # it was ended while it waited, which is nothing that this file did
        process = self._process or self._start()
        self._process = process
        is_late = threading.Event()

        def expire() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(OSError):
                send(cast(BinaryIO, process.stdin), header, data)
            reply = receive(cast(BinaryIO, process.stdout))
        finally:
            timer.cancel()
        if reply is None or is_late.is_set():
            self.kill()
        if reply is None and is_late.is_set():
            raise MediaError("timeout", f"decoding took longer than {timeout_s:g} s")
        return reply

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                cast(BinaryIO, stream).close()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        # Ray puts a job's code on sys.path only; the child must find the same packages.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # Every BLAS thread would reserve address space that counts against the child's memory limit.
        environment["OPENBLAS_NUM_THREADS"] = "1"
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.data.video_child", str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )


def _unpack(header: dict[str, Any], payload: bytes) -> NDArray[np.uint8]:
    if "error_class" in header:
        raise MediaError(header["error_class"], header["message"])
    return np.frombuffer(payload, dtype=np.uint8).reshape(header["shape"])
