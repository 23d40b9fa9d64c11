"""Reports where every rank stands when a step hangs."""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable

from pipelines.data import storage

STACKS_FOLDER = "stacks"
_LONGEST_PAUSE_S = 5.0


class Watchdog:
    """Writes the stacks of this rank's threads to RUN/stacks/rank-N.txt when no step ended for a while.

    All ranks wait for the one that hangs, so each of them writes its own file.

    Args:
        output: Run folder.
        rank: This rank.
        timeout_s: Longest step.
        warn: Callback that takes a warning for the user; called from a thread.
        start_step: Steps done before.
    """

    def __init__(
        self, output: str, rank: int, *, timeout_s: float, warn: Callable[[str], None], start_step: int = 0
    ) -> None:
        self._uri = storage.join(output, STACKS_FOLDER, f"rank-{rank}.txt")
        self._rank, self._timeout_s, self._warn = rank, timeout_s, warn
        self._num_steps, self._stopped = start_step, threading.Event()
        self._progress_at_s = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def report_progress(self, num_steps: int) -> None:
        """Reset the time-out.

        Args:
            num_steps: Steps done so far.
        """
        self._num_steps, self._progress_at_s = num_steps, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        reported_at_s = 0.0
        while not self._stopped.wait(min(_LONGEST_PAUSE_S, self._timeout_s / 4)):
            progress_at_s = self._progress_at_s
            if time.monotonic() - progress_at_s > self._timeout_s and progress_at_s != reported_at_s:
                reported_at_s = progress_at_s
                self._write_stacks()

    def _write_stacks(self) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            try:
                storage.write_bytes(self._uri, file.read())
            except Exception as error:  # whatever a file system raises; training may yet go on
                self._warn(
                    f"ALARM rank {self._rank} hangs after step {self._num_steps}, and {self._uri} cannot be written: "
                    f"{error}"
                )
                return
        self._warn(
            f"ALARM rank {self._rank} has done no step for {self._timeout_s:g} s after step {self._num_steps}; "
            f"its threads' stacks are in {self._uri}"
        )
