"""Metrics of the data pipeline for Prometheus, which reads them at every node's port as `ray_qformer_data_*`."""

from ray.util.metrics import Counter, Gauge, Histogram

from pipelines.data.media.stage_costs import StageCosts

_WAIT_BOUNDS_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


class DataMetrics:
    """Counters of one process of a job; Prometheus sums them over the ranks.

    Args:
        job: Job label: "train", "validation", "features", "prepare" or "caption".
        rank: Rank of the training worker; 0 in other jobs.
    """

    def __init__(self, job: str, rank: int = 0) -> None:
        tags = {"job": job, "rank": str(rank)}
        keys = tuple(tags)

        self._stage_seconds = Counter(
            "qformer_data_stage_seconds", "Seconds of work in each stage", (*keys, "stage")
        ).set_default_tags(tags)
        self._rows = Counter("qformer_data_rows", "Rows by outcome: used or quarantined", (*keys, "outcome"))
        self._rows.set_default_tags(tags)
        self._bytes = Counter("qformer_data_fetched_bytes", "Bytes of the files read", keys)
        self._bytes.set_default_tags(tags)
        self._share = Gauge("qformer_data_quarantine_rate", "Share of the rows so far that are quarantined", keys)
        self._share.set_default_tags(tags)
        self._depth = Gauge(
            "qformer_data_queue_depth",
            "Batches (features: shards, on average so far) that are ready for the model",
            keys,
        )
        self._depth.set_default_tags(tags)
        self._wait = Histogram(
            "qformer_data_wait_seconds", "Wait for the next batch (features: shard)", _WAIT_BOUNDS_S, keys
        )
        self._wait.set_default_tags(tags)
        self._num_used = self._num_quarantined = 0

    def count_batch(self, costs: StageCosts, *, rows_used: int, rows_quarantined: int) -> None:
        """Add a batch's rows, bytes and seconds of work."""
        for stage, seconds in costs.seconds().items():
            self._stage_seconds.inc(seconds, {"stage": stage})
        self._num_used += rows_used
        self._num_quarantined += rows_quarantined
        for outcome, rows in (("used", rows_used), ("quarantined", rows_quarantined)):
            if rows:
                self._rows.inc(rows, {"outcome": outcome})
        if costs.fetched_bytes:
            self._bytes.inc(costs.fetched_bytes)
        self._share.set(self._num_quarantined / max(1, self._num_used + self._num_quarantined))

    def observe_wait(self, seconds: float, queue_depth: float) -> None:
        """Record one wait for a batch, and the number of batches that are ready."""
        self._wait.observe(seconds)
        self._depth.set(queue_depth)
