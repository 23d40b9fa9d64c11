"""A marker file of a process that decodes an image; it survives a crash, so that the next process knows of it."""

import contextlib
import fcntl
import glob
import os
import tempfile
from types import TracebackType

_IDLE, _BUSY = b"\0", b"\1"


class CrashMarker:
    """Marks this process as decoding while its `with` block runs; costs two system calls.

    A process is the successor of a dead one with the same parent process, which for a Ray worker is the machine's
    raylet. Where the disk cannot be written, there is no marker.
    """

    def __init__(self) -> None:
        self.follows_crash = False
        """Whether this process replaces one that crashed while decoding. Each crash has one successor."""
        self._descriptor: int | None = None
        self._path = ""
        with contextlib.suppress(OSError):
            self.follows_crash = _claim_crash()
            self._create()

    def __enter__(self) -> None:
        self._write(_BUSY)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(_IDLE)

    def close(self) -> None:
        """Remove the marker."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, state: bytes) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, state, 0)

    def _create(self) -> None:
        while self._descriptor is None:
            name = f"{os.path.basename(_prefix())}{os.getppid()}-"
            descriptor, self._path = tempfile.mkstemp(prefix=name)
            # The lock ends with the process, also after a crash.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(self._path):
                self._descriptor = descriptor
            else:  # before it was locked, another process removed it as a dead one's
                os.close(descriptor)


def _claim_crash() -> bool:
    """Remove markers of dead processes, but at most one crashed sibling's; return whether there was one."""
    is_found = False
    for path in glob.glob(f"{glob.escape(_prefix())}*"):
        parent = int(path.removeprefix(_prefix()).partition("-")[0])
        if parent != os.getppid() and os.path.exists(f"/proc/{parent}"):
            continue  # it belongs to another parent, which starts its own successors
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            is_due = parent == os.getppid() and file.read(1) == _BUSY
            if not (is_due and is_found):
                os.unlink(path)
                is_found = is_found or is_due
    return is_found


def _prefix() -> str:
    return os.path.join(tempfile.gettempdir(), f"qformer-decoding-{os.getuid()}-")
