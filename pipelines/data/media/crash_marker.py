"""A note that a process is at a picture, which outlives it: so its successor learns of what it died."""

import contextlib
import fcntl
import glob
import os
import tempfile
from types import TracebackType

_IDLE, _BUSY = b"\0", b"\1"


class CrashMarker:
    """Says so on this machine's disk while its `with` block runs; costs two system calls.

    A process counts as the successor of a dead one that has the same parent: a Ray worker's is the machine's raylet.
    Where the disk cannot be written, nothing is noted.
    """

    def __init__(self) -> None:
        self.follows_crash = False
        """Whether one that died at a picture had no successor before. Each has one, so that all may die at a time."""
        self._descriptor: int | None = None
        self._path = ""
        with contextlib.suppress(OSError):
            self.follows_crash = _inherit()
            self._create()

    def __enter__(self) -> None:
        self._write(_BUSY)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(_IDLE)

    def close(self) -> None:
        """Take the note back."""
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
            # The lock goes with the process, however that ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(self._path):
                self._descriptor = descriptor
            else:  # another process took it for a dead one's before it was locked
                os.close(descriptor)


def _inherit() -> bool:
    """Remove what dead processes left; of siblings that died at a picture, only one's. Tell whether there was one."""
    is_found = False
    for path in glob.glob(f"{glob.escape(_prefix())}*"):
        parent = int(path.removeprefix(_prefix()).partition("-")[0])
        if parent != os.getppid() and os.path.exists(f"/proc/{parent}"):
            continue  # some other machinery's, which has successors of its own
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
            is_due = parent == os.getppid() and file.read(1) == _BUSY
            if not (is_due and is_found):
                os.unlink(path)
                is_found = is_found or is_due
    return is_found


def _prefix() -> str:
    return os.path.join(tempfile.gettempdir(), f"qformer-decoding-{os.getuid()}-")
