"""Memory of a process tree: proportional set sizes, so that shared pages count once."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_PAUSE_S = 0.2


def tree_bytes(root_pid: int) -> int:
    """Proportional set size of a process and its descendants."""
    return sum(map(own_bytes, tree_of(root_pid)))


def tree_of(root_pid: int) -> set[int]:
    """A process and its descendants."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # the process has ended
                # The name stands in parentheses and may hold anything, even parentheses.
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    tree = {root_pid}
    while grown := {pid for pid, parent in parents.items() if parent in tree and pid not in tree}:
        tree |= grown
    return tree


def resident_bytes(what: str) -> int:
    """Resident size of this process: "VmRSS" now, "VmHWM" its peak (`ru_maxrss` would include the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def own_bytes(pid: int) -> int:
    """Proportional set size of one process; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Largest size of a process tree while the `with` block ran.

    Args:
        root_pid: Root of the process tree.
    """

    def __init__(self, root_pid: int) -> None:
        self._root_pid = root_pid
        self.num_bytes = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Sample in a thread until the block ends, and once more."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(_PAUSE_S):
                self.num_bytes = max(self.num_bytes, tree_bytes(self._root_pid))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        begun_s = time.monotonic()
        try:
            yield
        finally:
            # Work shorter than the pause is measured at its end.
            time.sleep(max(0.0, _PAUSE_S - (time.monotonic() - begun_s)))
            done.set()
            thread.join()
            self.num_bytes = max(self.num_bytes, tree_bytes(self._root_pid))
