"""Writes a run's checkpoints in a thread while training goes on, and keeps the newest few."""

import threading
from collections.abc import Callable

from pipelines.data.storage.checkpoint_folders import prune
from pipelines.training.run.checkpoint import Checkpoint, remove_unfinished, write_checkpoint
from qformer.errors import UserError

_LAST_TRIES = 3
"""For the checkpoint that nothing comes after."""


class CheckpointError(UserError):
    """The last checkpoint cannot be written."""


class CheckpointWriter:
    """One checkpoint at a time; used by the first rank alone.

    A checkpoint that cannot be written (a full disk, a store that stays away) is told, and training goes on: the next
    one is the next try. Only the last has to succeed.

    Args:
        output: Run folder.
        keep: How many of the newest stay.
        alarm: Called from the thread with a line for the user.

    Attributes:
        best_step: Of a checkpoint that stays besides; 0 for none.
    """

    def __init__(self, output: str, *, keep: int, alarm: Callable[[str], None]) -> None:
        self._output, self._keep, self._alarm = output, keep, alarm
        self.best_step = 0
        remove_unfinished(output)
        self._thread: threading.Thread | None = None
        self._failed: tuple[Checkpoint, Exception] | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Start writing; waits first for the one before, so that at most one copy of the weights is held."""
        self._wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: If it could not be written after some tries more.
        """
        self._wait()
        for _ in range(_LAST_TRIES):
            if self._failed is None:
                return
            self._write(self._failed[0])
        if self._failed is not None:
            checkpoint, error = self._failed
            raise CheckpointError(
                f"the last checkpoint (step {checkpoint.state.step}) cannot be written to {self._output}: "
                f"{_told(error)}; make room there, and run again with --resume"
            ) from error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            write_checkpoint(self._output, checkpoint)
            self._failed = None
        except Exception as error:  # whatever a file system raises
            self._failed = (checkpoint, error)
            self._alarm(
                f"ALARM checkpoint of step {checkpoint.state.step} is not written: {_told(error)}; training goes on, "
                "and the next checkpoint is the next try"
            )
            return
        try:
            prune(self._output, self._keep, always=(self.best_step,))
        except Exception as error:
            self._alarm(f"older checkpoints of {self._output} cannot be removed: {_told(error)}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
