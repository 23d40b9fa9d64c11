"""Batches of a run in a fixed order: planned in segments, decoded by Ray Data, read ahead on every rank."""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.dataset import RankStream, build_segment, close_segment
from pipelines.data.features.cache import FeatureCache
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.global_batches import Order
from pipelines.training.records.data_metrics import DataMetrics

SEGMENT_STEPS = 512
"""Most steps planned as one dataset: enough to hide its start, few enough that planning takes a second or two."""
PREFETCHED_BATCHES = 4
_LEAD_STEPS, _LEAD_STARTS = 64, 2.0
"""The next segment starts when at most this many steps are left, or when the steps left take at most this many times
the start of the current segment. Short segments therefore always overlap with their successors."""
_OPEN_SEGMENTS = 2
"""Most segments of one attempt that the feed holds. A rank that asks for the next segment has read batches of the
current one, so every rank has its stream of the current one. Each held segment costs a process, even when fully read.
"""


class BatchFeed:
    """Plans segments and starts their datasets; one actor a run, so that all ranks share each dataset.

    Args:
        order: Order of the rows.
        rows: A list of one reference to the run's `mixture.Corpus` in Ray's object store; Ray would resolve a bare one.
        total_steps: Steps of the whole run.
        decode_workers: Number of decoding actors. Where two segments overlap there may be twice as many, as far as the
            cluster has CPUs for them.
        reserves_cpus: Whether each decoding actor reserves a CPU; see `build_segment`.
        segment_steps: Most steps of a segment.
    """

    def __init__(
        self,
        order: Order,
        rows: list[ray.ObjectRef],
        *,
        total_steps: int,
        decode_workers: int,
        reserves_cpus: bool = True,
        segment_steps: int = SEGMENT_STEPS,
    ) -> None:
        self.order, self.rows = order, rows
        self.total_steps, self.decode_workers, self.segment_steps = total_steps, decode_workers, segment_steps
        self.reserves_cpus = reserves_cpus
        self._attempts: list[str] = []
        self._segments: dict[tuple[int, int], list[RankStream]] = {}

    def segment(
        self, attempt: str, first_step: int, world_size: int, source: DecodeSettings | FeatureCache
    ) -> list[RankStream]:
        """One iterator for each rank over a segment's steps; the same objects for every rank of an attempt.

        A new attempt closes the segments of the one before, whose datasets wait for ranks that are dead.

        Args:
            attempt: Name of this start of the worker group.
            first_step: First step of the segment.
            world_size: Number of ranks.
            source: How files become pixels, or the feature cache to read instead.

        Raises:
            RuntimeError: If a newer attempt has begun, which means that the calling rank is left over.
        """
        if attempt not in self._attempts:
            for streams in self._segments.values():
                close_segment(streams)
            self._segments.clear()
            self._attempts.append(attempt)
        if attempt != self._attempts[-1]:
            raise RuntimeError(f"attempt {attempt} asks for step {first_step}, but {self._attempts[-1]} has begun")
        key = (first_step, world_size)
        if key not in self._segments:
            self._segments[key] = build_segment(
                self.order,
                self.rows[0],
                first_step=first_step,
                end_step=min(first_step + self.segment_steps, self.total_steps),
                world_size=world_size,
                source=source,
                decode_workers=self.decode_workers,
                reserves_cpus=self.reserves_cpus,
            )
            # Ranks that still read an old segment hold references of their own.
            for old in sorted(self._segments)[:-_OPEN_SEGMENTS]:
                del self._segments[old]
        return self._segments[key]


class _SegmentReader:
    """Reads one rank's part of a segment ahead of the training, in a thread.

    Args:
        open_stream: Function from a first step to this rank's stream.
        first_step: First step of the segment.
        rank: This rank.
        is_pinned: Whether pixels or features go into page-locked memory, from which a GPU copies while it computes.

    Attributes:
        end_step: Exclusive end of the segment; equal to `first_step` until the stream is open.
        start_s: Seconds from the start of the thread to the first batch.
        ready: Batches read ahead, then None; or the error that ended the reading.
    """

    def __init__(
        self, open_stream: Callable[[int], RankStream], first_step: int, rank: int, is_pinned: bool = False
    ) -> None:
        self._open_stream, self._first_step, self._rank, self._is_pinned = open_stream, first_step, rank, is_pinned
        self.end_step = first_step
        self.start_s = 0.0
        self.ready: queue.Queue[SampleBatch | BaseException | None] = queue.Queue(maxsize=PREFETCHED_BATCHES)
        threading.Thread(target=self._read, name=f"segment-{first_step}", daemon=True).start()

    def is_near_end(self, step: int, taken_s: float) -> bool:
        """Whether the next segment should start now.

        Args:
            step: Next step of the training.
            taken_s: Seconds since the segment's first batch.
        """
        num_left, num_done = self.end_step - step, step - self._first_step
        left_s = num_left * taken_s / num_done if num_done else math.inf
        return num_left <= _LEAD_STEPS or left_s <= _LEAD_STARTS * self.start_s

    def _read(self) -> None:
        begun_s = time.perf_counter()
        try:
            stream, step = self._open_stream(self._first_step), self._first_step
            self.end_step = stream.first_step + stream.num_steps
            for batch in stream:
                if (batch.step, batch.rank) != (step, self._rank):
                    raise RuntimeError(f"rank {self._rank} at step {step} was given ({batch.step}, {batch.rank})")
                self.start_s = self.start_s or time.perf_counter() - begun_s
                self.ready.put(_pin(batch) if self._is_pinned else batch)
                step += 1
            if step != self.end_step:
                raise RuntimeError(f"rank {self._rank}'s segment ended before step {step}, not {self.end_step}")
            self.ready.put(None)
        except BaseException as error:  # raised in the training thread
            self.ready.put(error)


def _pin(batch: SampleBatch) -> SampleBatch:
    """Copy a batch's pixels or features into page-locked memory."""
    import torch  # not needed in the feed's own actor

    return dataclasses.replace(batch, images=torch.from_numpy(batch.images).pin_memory().numpy())


def rank_batches(
    feed: Any,
    *,
    attempt: str,
    start_step: int,
    total_steps: int,
    rank: int,
    world_size: int,
    source: DecodeSettings | FeatureCache,
    is_pinned: bool = False,
    job: str = "train",
) -> Iterator[SampleBatch]:
    """This rank's batches from `start_step` to the end, fetched ahead by threads.

    Args:
        feed: Handle of a `BatchFeed` or `RunCoordinator` actor.
        attempt: Name of this start of the worker group: the same on all its ranks, a new one after every restart.
        start_step: First step.
        total_steps: Exclusive end.
        rank: This rank.
        world_size: Number of ranks.
        source: How files become pixels, or the feature cache to read instead.
        is_pinned: Whether batches go into page-locked memory, for a GPU.
        job: Job label of the Prometheus metrics.
    """
    metrics = DataMetrics(job, rank)

    def open_stream(step: int) -> RankStream:
        streams: list[RankStream] = ray.get(feed.segment.remote(attempt, step, world_size, source))
        return streams[rank]

    step, following = start_step, None
    while step < total_steps:
        reader = following or _SegmentReader(open_stream, step, rank, is_pinned)
        following, begun_s, first_at_s = None, time.perf_counter(), 0.0
        while (item := reader.ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            depth = reader.ready.qsize()
            metrics.observe_wait(time.perf_counter() - begun_s, queue_depth=depth)
            metrics.count_batch(item.costs, rows_used=int(item.is_valid.sum()), rows_quarantined=len(item.failures))
            # The step of the training, not of the reader, decides: so at most two segments are open.
            first_at_s = first_at_s or time.perf_counter()
            is_near_end = reader.is_near_end(step, time.perf_counter() - first_at_s)
            if following is None and is_near_end and reader.end_step < total_steps:
                following = _SegmentReader(open_stream, reader.end_step, rank, is_pinned)
            step += 1
            yield dataclasses.replace(item, queue_depth=depth)
            begun_s = time.perf_counter()
