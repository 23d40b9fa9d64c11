"""Time of the training workers by cause: waiting for batches, encoding, the rest of the step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.media.stage_costs import StageCosts
from qformer.distributed import mean_of_ranks, world_size

_MAX_PENDING_EVENTS = 64


@dataclass(slots=True)
class RunTimes:
    """Times and counts of one rank's loop since it began; `combined` sums them over the ranks."""

    wall_s: float = 0.0
    wait_s: float = 0.0
    """Seconds spent waiting for the next batch."""
    rows: int = 0
    rows_quarantined: int = 0
    steps: int = 0
    queued: int = 0
    """Number of batches that were ready when the next was taken, summed over the steps."""
    costs: StageCosts = field(default_factory=StageCosts)
    """Work of the data pipeline's workers on the batches; it runs at the same time as the training."""
    _window: StageCosts = field(default_factory=StageCosts)

    def add(self, batch: SampleBatch, wait_s: float) -> None:
        """Count one batch."""
        self.wait_s += wait_s
        self.rows += sum(1 for sample_id in batch.sample_ids if sample_id)
        self.rows_quarantined += len(batch.failures)
        self.steps += 1
        self.queued += batch.queue_depth
        self.costs.add(batch.costs)
        self._window.add(batch.costs)

    def window(self) -> dict[str, float]:
        """Work of the data pipeline on the batches since the last call, for the log; all ranks must call."""
        own, self._window = _data_costs(self._window), StageCosts()
        return {f"data/{name}": mean_of_ranks(value) * world_size() for name, value in own.items()}

    def combined(self, encode_s: float) -> dict[str, float]:
        """Times and counts of all ranks, which must all call.

        Args:
            encode_s: Seconds that this rank spent in the frozen encoder.

        Returns:
            wall_s of this rank; sums of wait_s, encode_s, rows and the data pipeline's costs; queue_depth, the mean
            number of batches ready for a rank; quarantine_rate, the share of rows that are quarantined.
        """
        own = {"wait_s": self.wait_s, "encode_s": encode_s, "rows": self.rows, **_data_costs(self.costs)}
        sums = {name: mean_of_ranks(value) * world_size() for name, value in own.items()}
        queue_depth = mean_of_ranks(self.queued / max(1, self.steps))
        quarantined = mean_of_ranks(self.rows_quarantined) * world_size()
        shares = {"queue_depth": queue_depth, "quarantine_rate": quarantined / max(1.0, sums["rows"])}
        return {"wall_s": self.wall_s, **sums, **shares}


class EncodeTimer:
    """Sums the seconds that encoding takes; on a GPU with events, without synchronising after each batch.

    Args:
        encode: Function from a batch to its tokens.
        device: Device of the encoder.
    """

    def __init__(self, encode: Callable[[SampleBatch], Tensor], device: torch.device) -> None:
        self._encode, self._is_cuda = encode, device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __call__(self, batch: SampleBatch) -> Tensor:
        """Encode."""
        if not self._is_cuda:
            begun_s = time.perf_counter()
            tokens = self._encode(batch)
            self._seconds += time.perf_counter() - begun_s
            return tokens
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        tokens = self._encode(batch)
        end.record()
        self._events.append((begin, end))
        if len(self._events) > _MAX_PENDING_EVENTS:
            self._collect()
        return tokens

    @property
    def seconds(self) -> float:
        """Seconds of encoding so far."""
        self._collect()
        return self._seconds

    def _collect(self) -> None:
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()


def _data_costs(costs: StageCosts) -> dict[str, float]:
    return {
        "fetch_s": costs.fetch_s,
        "decode_s": costs.decode_s,
        "transform_s": costs.transform_s,
        "fetched_bytes": float(costs.fetched_bytes),
    }
