"""Batches of a run in their fixed order: planned in segments, decoded by Ray Data, handed to the ranks in turn."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray

from pipelines.data.batch import SampleBatch
from pipelines.data.dataset import build_segment
from pipelines.data.features import FeatureCache
from pipelines.data.order import Order
from pipelines.data.samples import DecodeSettings
from pipelines.training.data_metrics import DataMetrics

SEGMENT_STEPS = 512
"""Most steps planned as one dataset: enough to hide its start, few enough that planning takes a second or two."""
PREFETCHED_BATCHES = 4


class BatchFeed:
    """Plans segments and starts their datasets; one actor a run, so that all ranks share each dataset.

    Args:
        order: Of the run.
        rows: A list of one reference to the run's `mixture.Corpus` in Ray's object store; bare, Ray would resolve it.
        total_steps: Of the run.
        decode_workers: Decoding actors.
    """

    def __init__(self, order: Order, rows: list[ray.ObjectRef], *, total_steps: int, decode_workers: int) -> None:
        self.order, self.rows = order, rows
        self.total_steps, self.decode_workers = total_steps, decode_workers
        self._segment: tuple[tuple[int, int], list[Any]] | None = None

    def segment(self, first_step: int, world_size: int, source: DecodeSettings | FeatureCache) -> list[Any]:
        """One iterator a rank over the segment's steps; the same objects for every rank that asks."""
        key = (first_step, world_size)
        if self._segment is None or self._segment[0] != key:
            iterators = build_segment(
                self.order,
                self.rows[0],
                first_step=first_step,
                end_step=min(first_step + SEGMENT_STEPS, self.total_steps),
                world_size=world_size,
                source=source,
                decode_workers=self.decode_workers,
            )
            self._segment = (key, iterators)
        return self._segment[1]


def rank_batches(
    feed: Any,
    *,
    start_step: int,
    total_steps: int,
    rank: int,
    world_size: int,
    source: DecodeSettings | FeatureCache,
) -> Iterator[SampleBatch]:
    """This rank's batches from `start_step` to the end, fetched ahead by a thread.

    Args:
        feed: Handle of a `BatchFeed` actor.
        start_step: First step wanted.
        total_steps: End of the run.
        rank: This rank.
        world_size: Number of ranks.
        source: How files become pixels, or the feature cache to read instead.
    """
    ready: queue.Queue[SampleBatch | BaseException | None] = queue.Queue(maxsize=PREFETCHED_BATCHES)
    metrics = DataMetrics("train", rank)

    def fetch() -> None:
        try:
            step = start_step
            while step < total_steps:
                for batch in ray.get(feed.segment.remote(step, world_size, source))[rank]:
                    if (batch.step, batch.rank) != (step, rank):
                        raise RuntimeError(f"rank {rank} at step {step} was given ({batch.step}, {batch.rank})")
                    ready.put(batch)
                    step += 1
            ready.put(None)
        except BaseException as error:  # handed to the training thread, which raises it
            ready.put(error)

    threading.Thread(target=fetch, name="batch-feed", daemon=True).start()
    while True:
        begun_s = time.perf_counter()
        item = ready.get()
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        metrics.waited(time.perf_counter() - begun_s, queue_depth=ready.qsize())
        metrics.count(item.costs, rows_used=int(item.is_valid.sum()), rows_quarantined=len(item.failures))
        yield item
