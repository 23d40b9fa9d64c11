"""What a process and all that it started hold: memory and open files."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from jobs.bench.data_memory import own_bytes, tree_of


def holdings(root_pid: int, is_meant: Callable[[str], bool] = lambda command: True) -> dict[int, tuple[int, int]]:
    """Proportional set size in bytes and open files, by process id.

    Args:
        root_pid: Of the tree.
        is_meant: By the command line; others are left out.
    """
    found = {}
    for pid in tree_of(root_pid):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if is_meant(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")):
                found[pid] = own_bytes(pid), len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return found
