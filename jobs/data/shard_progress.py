"""Progress of a job that writes shards, and the time of its stages."""

import dataclasses
import logging
import time

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.batches.stage_report import WorkerPool, stage_table
from pipelines.data.media.stage_costs import StageCosts, sum_costs

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 5.0
_MODEL_STAGES = ("encode", "generate", "write")
"""Stages of the model actors; the decode actors run the others."""


class ShardProgress:
    """Logs how many rows are done and how long the rest will take.

    Args:
        verb: Past participle for messages, such as "encoded".
        num_rows: Number of rows of the manifest.
        num_missing: Number of rows still to be processed.
    """

    def __init__(self, verb: str, num_rows: int, num_missing: int) -> None:
        self._verb, self.num_rows, self._num_missing = verb, num_rows, num_missing
        self._done = self.num_failed = 0
        self._wait_s = self._queued_s = 0.0
        self.costs = StageCosts()
        self.begin()
        if num_missing < num_rows:
            logger.info("%d of %d rows exist already", num_rows - num_missing, num_rows)

    def begin(self) -> None:
        """Start the clock."""
        self._begun_s = self._logged_at_s = time.monotonic()

    def add(self, done: pa.Table) -> None:
        """Count finished shards by their rows of `EncodeShards`."""
        self._done += pc.sum(done["rows"]).as_py()
        self.num_failed += pc.sum(done["failed"]).as_py()
        self._wait_s += pc.sum(done["wait_s"]).as_py()
        self._queued_s += pc.sum(done["queued_s"]).as_py()
        self.costs.add(sum_costs(done))
        now_s = time.monotonic()
        if self._done == self._num_missing or now_s - self._logged_at_s > _PROGRESS_EVERY_S:
            self._logged_at_s = now_s
            rate = self._done / (now_s - self._begun_s)
            left_s = (self._num_missing - self._done) / rate
            there = self.num_rows - self._num_missing + self._done
            logger.info("%s %d of %d rows, %.0f rows/s, %.0f s left", self._verb, there, self.num_rows, rate, left_s)

    @property
    def queue_depth(self) -> float:
        """Mean number of decoded shards that waited for a model, by Little's law."""
        return self._queued_s / max(time.monotonic() - self._begun_s, 1e-9)

    def stages(self) -> dict[str, float]:
        """Values for the summary: seconds of each stage, and of waiting."""
        seconds = self.costs.seconds()
        return {**seconds, "wait_s": self._wait_s, "queue_depth": self.queue_depth} if self._done else seconds

    def table(self, decoding: WorkerPool, model: WorkerPool) -> str:
        """Table of the time of each stage; the seconds of the two pools are filled in here."""
        seconds = self.costs.seconds()
        own = {stage: seconds.pop(stage) for stage in list(seconds) if stage in _MODEL_STAGES}
        pools = [dataclasses.replace(decoding, seconds=seconds), dataclasses.replace(model, seconds=own)]
        wall_s = time.monotonic() - self._begun_s
        return stage_table(pools, wall_s=wall_s, rows=self._done, fetched_bytes=self.costs.fetched_bytes)
