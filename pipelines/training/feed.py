"""Batches of a run in their fixed order: planned in segments, decoded by Ray Data, handed to the ranks in turn."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipelines.data.batch import SampleBatch
from pipelines.data.dataset import build_segment
from pipelines.data.features import FeatureCache
from pipelines.data.order import batches_per_epoch, epoch_order
from pipelines.data.samples import DecodeSettings
from pipelines.data.schema import KIND, KINDS
from pipelines.training.data_metrics import DataMetrics

SEGMENT_STEPS = 512
"""Steps planned as one dataset: enough to hide its start, few enough that planning takes seconds at most."""
PREFETCHED_BATCHES = 4


def kind_codes(manifest: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each row's kind as an integer, for `order`."""
    codes = {kind: code for code, kind in enumerate(sorted(KINDS))}
    return np.array([codes[kind] for kind in manifest[KIND].to_pylist()], dtype=np.int64)


def steps_per_epoch(manifest: pa.Table, global_batch: int) -> int:
    """Optimizer steps that see every row once."""
    return batches_per_epoch(kind_codes(manifest), global_batch)


class BatchFeed:
    """Plans segments and starts their datasets; one actor a run, so that all ranks share each dataset.

    Args:
        manifest: Rows of the training split.
        global_batch: Rows of one step over all ranks.
        total_steps: Of the run.
        seed: Of the run.
        decode_workers: Decoding actors.
    """

    def __init__(
        self, manifest: pa.Table, *, global_batch: int, total_steps: int, seed: int, decode_workers: int
    ) -> None:
        self.manifest, self.global_batch, self.total_steps = manifest, global_batch, total_steps
        self.seed, self.decode_workers = seed, decode_workers
        self.kinds = kind_codes(manifest)
        self.epoch_steps = batches_per_epoch(self.kinds, global_batch)
        self._segment: tuple[tuple[int, int], list[Any]] | None = None

    def segment(self, first_step: int, world_size: int, source: DecodeSettings | FeatureCache) -> list[Any]:
        """One iterator a rank over the segment's steps; the same objects for every rank that asks."""
        key = (first_step, world_size)
        if self._segment is None or self._segment[0] != key:
            steps = np.arange(first_step, min(first_step + SEGMENT_STEPS, self.total_steps))
            epochs = steps // self.epoch_steps
            orders = {epoch: epoch_order(self.kinds, self.seed, int(epoch), self.global_batch) for epoch in set(epochs)}
            batches = np.stack([orders[e][s % self.epoch_steps] for e, s in zip(epochs, steps, strict=True)])
            iterators = build_segment(
                self.manifest,
                batches,
                first_step=first_step,
                epochs=epochs,
                seed=self.seed,
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
