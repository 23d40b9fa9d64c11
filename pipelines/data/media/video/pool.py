"""Decode videos, and images on request, in child processes that are killed at a deadline and replaced after a crash."""

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.data.failures import MediaError
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.clip import BACKEND_NAMES, Clip, ClipRequest, WaveformRequest
from pipelines.data.media.facts import MediaFacts
from pipelines.data.media.video.wire import enlarge_pipe, receive, send

# The child decodes untrusted files: it gets the variables it needs to run, and no credentials.
_PASSED_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
_EXTERNAL_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_KILLS = 5
"""Children of one clip that may be killed by other processes."""
_EXIT_S = 5.0
"""Time within which a child that closed its pipe must end."""


class VideoPool:
    """A pool of decoding child processes, started when first needed and reused. Thread-safe.

    Args:
        timeout_s: Deadline of one clip, after which its child is killed.
        memory_bytes: Address space of a child.
        size: Number of children, and so of clips decoded at the same time.
    """

    def __init__(self, *, timeout_s: float, memory_bytes: int, size: int = 1) -> None:
        self._timeout_s = timeout_s
        self._children = [_Child(memory_bytes) for _ in range(size)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def read_clip(
        self,
        request: ClipRequest,
        *,
        path: str | None = None,
        data: bytes = b"",
        backends: Sequence[str] = BACKEND_NAMES,
    ) -> Clip:
        """Decode sampled frames of one clip.

        A crash is attributed to the first backend, which comes last in the second try. A child that another process
        killed (the kernel short of memory, a person) says nothing about file or backend: another child tries again.

        Args:
            request: Decode settings.
            path: Local file; None to decode `data`.
            data: The file's content.
            backends: Names of the backends to try, in this order.

        Raises:
            MediaError: If the clip cannot be used, takes too long, or crashes its decoder twice; "transient" if its
                children are killed repeatedly.
        """
        header = {"task": "clip", "request": request.to_dict(), "path": path}
        tries = [list(backends), [*backends[1:], *backends[:1]]]
        return self._clip([{**header, "backends": names} for names in tries], data, request.audio)

    def read_image(self, data: bytes, request: ClipRequest) -> Clip:
        """Decode an image as `image_clip.decode_image_clip` does, isolated in a child process.

        Raises:
            MediaError: If the image cannot be used, takes too long, or crashes its decoder twice.
        """
        header = {"task": "image", "request": request.to_dict(), "path": None}
        return self._clip([header, header], data, None)

    def _clip(self, headers: list[dict[str, Any]], data: bytes, audio: AudioSampling | None) -> Clip:
        reply, payload = self._request(headers, data)
        num_pixels = math.prod(reply["shape"])
        pixels = np.frombuffer(payload, dtype=np.uint8, count=num_pixels).reshape(reply["shape"])
        facts = None if reply["facts"] is None else MediaFacts(**reply["facts"])
        frame_valid = np.array(reply["frame_valid"], dtype=np.bool_)
        if audio is None:
            return Clip(pixels, frame_valid, facts)
        waveforms, _ = audio.silence()
        audio_valid = np.array(reply["audio_valid"], dtype=np.bool_)
        valid_waveforms = np.frombuffer(payload, dtype=np.uint8, offset=num_pixels).view(np.float32)
        waveforms[audio_valid] = valid_waveforms.reshape(-1, audio.segment_samples)
        return Clip(pixels, frame_valid, facts, waveforms, audio_valid)

    def read_waveform(
        self, request: WaveformRequest, *, max_pixels: int, path: str | None = None, data: bytes = b""
    ) -> NDArray[np.float32] | None:
        """Decode the first audio track to mono.

        Args:
            request: Sample rate and part.
            max_pixels: Limit of width x height of the video frames.
            path: Local file; None to decode `data`.
            data: The file's content.

        Returns:
            float32 [samples], or None when there is no audio track; see `waveform.read_waveform`.

        Raises:
            MediaError: If the sound cannot be used; see `read_clip`.
        """
        header = {"task": "waveform", "request": request.to_dict(), "path": path, "max_pixels": max_pixels}
        reply, payload = self._request([header, header], data)
        return np.frombuffer(payload, dtype=np.float32) if reply["has_audio"] else None

    def child_pids(self) -> list[int]:
        """Process ids of the running children."""
        return [child.pid for child in self._children if child.pid is not None]

    def _request(self, headers: list[dict[str, Any]], data: bytes) -> tuple[dict[str, Any], bytearray]:
        """Send the headers in turn until a child survives one; repeat a header whose child another process killed."""
        child = self._idle.get()
        num_crashes = num_kills = 0
        try:
            while num_crashes < len(headers) and num_kills < _MAX_KILLS:
                answer = child.request({**headers[num_crashes], "timeout_s": self._timeout_s}, data, self._timeout_s)
                if not isinstance(answer, _ChildExit):
                    reply, payload = answer
                    if "error_class" in reply:
                        raise MediaError(reply["error_class"], reply["message"], stage=reply["stage"])
                    return reply, payload
                num_kills += answer.is_external
                num_crashes += not answer.is_external
        finally:
            self._idle.put(child)
        if num_kills == _MAX_KILLS:
            message = f"the decoder was killed {num_kills} times from outside; is the machine short of memory?"
            raise MediaError("transient", message, tries=num_kills + num_crashes)
        raise MediaError("corrupt", f"the decoder crashed twice on this file ({answer})", tries=num_kills + num_crashes)

    def close(self) -> None:
        """End the children. A later request starts new ones."""
        for child in self._children:
            child.kill()


@dataclass(frozen=True, slots=True)
class _ChildExit:
    """How a child ended without a reply."""

    returncode: int
    """`subprocess.Popen.returncode`: minus the signal, where a signal ended it."""

    @property
    def is_external(self) -> bool:
        """Whether another process ended it; crashes of decoders have other signals."""
        return -self.returncode in _EXTERNAL_SIGNALS

    def __str__(self) -> str:
        return signal.Signals(-self.returncode).name if self.returncode < 0 else f"exit code {self.returncode}"


class _Child:
    """One decoding process, started on demand."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe_lock = threading.RLock()
        """Held while the pipes are in use: file descriptors of closed ones may be reused for another child."""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def request(
        self, header: dict[str, Any], data: bytes, timeout_s: float
    ) -> tuple[dict[str, Any], bytearray] | _ChildExit:
        """Send a request and wait for its reply.

        Raises:
            MediaError: "timeout".
        """
        with self._pipe_lock:
            if self._process is not None and self._process.poll() is not None:
                self.kill()  # it ended while idle, which this file did not cause
            process = self._process or self._start()
            self._process = process
            deadline_s = time.monotonic() + timeout_s
            try:
                with contextlib.suppress(OSError):
                    send(cast(RawIOBase, process.stdin), header, data, deadline_s=deadline_s)
                reply = receive(cast(RawIOBase, process.stdout), deadline_s)
            except TimeoutError:
                self.kill()
                raise MediaError("timeout", f"decoding took longer than {timeout_s:g} s") from None
        if reply is not None:
            return reply
        if self._process is not process:
            raise MediaError("transient", "the decoder was closed while it worked")
        try:
            returncode = process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            returncode = 0  # it closed its pipe but still runs: a fault of the child itself
        self.kill()
        return _ChildExit(returncode)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        with self._pipe_lock:
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    cast(RawIOBase, stream).close()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
        # Ray adds a job's code to sys.path only; the child must find the same packages.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # Every BLAS thread would reserve address space that counts against the child's memory limit.
        environment["OPENBLAS_NUM_THREADS"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.data.media.video.child", str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        for stream in (process.stdin, process.stdout):
            enlarge_pipe(cast(RawIOBase, stream))
            os.set_blocking(cast(RawIOBase, stream).fileno(), False)
        return process
