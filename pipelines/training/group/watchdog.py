"""Says where every rank stands when a step hangs."""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable

from pipelines.data import storage

STACKS_FOLDER = "stacks"
_LONGEST_PAUSE_S = 5.0


class Watchdog:
    """Writes the stacks of this rank's threads to RUN/stacks/rank-N.txt when no step was done for a while.

    All ranks wait for the one that hangs, so that each of them tells where it waits.

    Args:
        output: Run folder.
        rank: This rank.
        timeout_s: Longest step.
        alarm: Called from a thread with a line for the user.
        done: Steps done before.
    """

    def __init__(
        self, output: str, rank: int, *, timeout_s: float, alarm: Callable[[str], None], done: int = 0
    ) -> None:
        self._uri = storage.join(output, STACKS_FOLDER, f"rank-{rank}.txt")
        self._rank, self._timeout_s, self._alarm = rank, timeout_s, alarm
        self._done, self._stopped = done, threading.Event()
        self._beaten_s = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, done: int) -> None:
        """Told after every step, with the number of steps done."""
        self._done, self._beaten_s = done, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        told_s = 0.0
        while not self._stopped.wait(min(_LONGEST_PAUSE_S, self._timeout_s / 4)):
            beaten_s = self._beaten_s
            if time.monotonic() - beaten_s > self._timeout_s and beaten_s != told_s:
                told_s = beaten_s
                self._tell()

    def _tell(self) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            try:
                storage.write_bytes(self._uri, file.read())
            except Exception as error:  # whatever a file system raises; training may yet go on
                self._alarm(
                    f"ALARM rank {self._rank} hangs after step {self._done}, and {self._uri} has no room: {error}"
                )
                return
        self._alarm(
            f"ALARM rank {self._rank} has done no step for {self._timeout_s:g} s after step {self._done}; "
            f"what it waits for stands in {self._uri}"
        )
