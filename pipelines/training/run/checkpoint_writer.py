"""Writes a run's checkpoints in a thread while training goes on, and deletes old ones."""

import threading
from collections.abc import Callable

from pipelines.data.storage.checkpoint_folders import prune
from pipelines.training.run.checkpoint import Checkpoint, remove_unfinished, write_checkpoint
from qformer.errors import UserError

_LAST_TRIES = 3
"""Further attempts at the last checkpoint of a run."""


class CheckpointError(UserError):
    """The last checkpoint cannot be written."""


class CheckpointWriter:
    """Writes one checkpoint at a time; used by the first rank alone.

    A checkpoint that cannot be written (a full disk, an unreachable store) is a warning, and training goes on: the
    next checkpoint is the next try. Only the last has to succeed.

    Args:
        output: Run folder.
        num_newest: Number of newest checkpoints that are not deleted.
        warn: Callback that takes a warning for the user; called from the thread.

    Attributes:
        best_step: Step of a further checkpoint that is not deleted; 0 for none.
    """

    def __init__(self, output: str, *, num_newest: int, warn: Callable[[str], None]) -> None:
        self._output, self._num_newest, self._warn = output, num_newest, warn
        self.best_step = 0
        remove_unfinished(output)
        self._thread: threading.Thread | None = None
        self._failed: tuple[Checkpoint, Exception] | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Start writing, after the checkpoint before is written: memory holds at most one copy of the weights."""
        self._wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: If it could not be written after some further attempts.
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
                f"{_one_line(error)}; make room there, and run again with --resume"
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
            self._warn(
                f"ALARM checkpoint of step {checkpoint.state.step} is not written: {_one_line(error)}; "
                "training goes on, and the next checkpoint is the next try"
            )
            return
        try:
            prune(self._output, self._num_newest, always=(self.best_step,))
        except Exception as error:
            self._warn(f"older checkpoints of {self._output} cannot be removed: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """Class and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
