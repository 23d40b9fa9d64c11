"""The one actor of a run: it hands out batches to the ranks, and messages and metrics to the driver."""

from pipelines.data.dataset import RankStream
from pipelines.data.features.cache import FeatureCache
from pipelines.data.media.samples import DecodeSettings
from pipelines.training.group.feed import BatchFeed
from pipelines.training.records.run_status import RunStatus

COORDINATOR_DIED = (
    "the process that hands out the batches died (killed, or out of memory); the run stands at its newest checkpoint: "
    "run the same command with --resume"
)


class RunCoordinator:
    """A batch feed and the run's status behind one actor: an actor process takes 0.7 % of a core, idle or not.

    Calls run one after another. A read of the status waits a second or two while a segment is planned; training reads
    the status only where it starts or ends on a user error.

    Args:
        feed: The run's batch feed, not yet used.
    """

    def __init__(self, feed: BatchFeed) -> None:
        self._feed = feed
        self._status = RunStatus()

    def segment(
        self, attempt: str, first_step: int, world_size: int, source: DecodeSettings | FeatureCache
    ) -> list[RankStream]:
        """See `BatchFeed.segment`."""
        return self._feed.segment(attempt, first_step, world_size, source)

    def record_start(self, step: int) -> int:
        """See `RunStatus.record_start`."""
        return self._status.record_start(step)

    def record_user_error(self, message: str) -> None:
        """See `RunStatus.record_user_error`."""
        self._status.record_user_error(message)

    def user_error(self) -> str | None:
        """See `RunStatus.user_error`."""
        return self._status.user_error()

    def set_metrics(self, metrics: dict[str, float]) -> None:
        """See `RunStatus.set_metrics`."""
        self._status.set_metrics(metrics)

    def post(self, message: str) -> None:
        """See `RunStatus.post`."""
        self._status.post(message)

    def record_failure(self, message: str) -> None:
        """See `RunStatus.record_failure`."""
        self._status.record_failure(message)

    def take_failures(self) -> list[str]:
        """See `RunStatus.take_failures`."""
        return self._status.take_failures()

    def read(self, first_message: int = 0) -> tuple[dict[str, float], list[str]]:
        """See `RunStatus.read`."""
        return self._status.read(first_message)
