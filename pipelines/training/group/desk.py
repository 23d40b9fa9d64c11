"""What all ranks and the driver of a run share: its batches, and what there is to tell of it."""

from typing import Any

from pipelines.training.group.feed import BatchFeed
from pipelines.training.records.telemetry import ProgressBoard

DESK_DIED = (
    "the process that hands out the batches died (killed, or out of memory); the run stands at its newest checkpoint: "
    "run the same command with --resume"
)


class RunDesk(BatchFeed, ProgressBoard):
    """Both in one actor: each process of Ray's takes 0.7 % of a core of the training, idle or not.

    Who asks the board while a segment is planned waits a second or two; the training asks where it starts, or ends on a
    mistake.

    Args:
        arguments: Of `BatchFeed`.
        options: Likewise.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        BatchFeed.__init__(self, *arguments, **options)
        ProgressBoard.__init__(self)
