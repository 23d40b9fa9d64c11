"""Where the training workers' time goes: waiting for batches, encoding, the rest of the step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.media.stage_costs import StageCosts
from qformer.distributed import mean_of_ranks, world_size

_KEPT_EVENTS = 64


@dataclass(slots=True)
class RunTimes:
    """One rank's loop since it began; `combined` adds all ranks up."""

    wall_s: float = 0.0
    wait_s: float = 0.0
    """For the next batch."""
    rows: int = 0
    rows_quarantined: int = 0
    steps: int = 0
    queued: int = 0
    """Batches that were ready when one was taken, summed over the steps."""
    costs: StageCosts = field(default_factory=StageCosts)
    """What the batches took the data plane's workers, which work at the same time."""
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
        """What the batches since the last call took the data plane, for the log; all ranks must call."""
        own, self._window = _data_costs(self._window), StageCosts()
        return {f"data/{name}": mean_of_ranks(value) * world_size() for name, value in own.items()}

    def combined(self, encode_s: float) -> dict[str, float]:
        """Sums over all ranks, which must all call: wait_s, encode_s, rows, and the data plane's costs.

        And two shares: queue_depth, batches ready for a rank on average, and quarantine_rate, of the rows.

        Args:
            encode_s: Seconds that this rank spent in the frozen encoder.
        """
        own = {"wait_s": self.wait_s, "encode_s": encode_s, "rows": self.rows, **_data_costs(self.costs)}
        sums = {name: mean_of_ranks(value) * world_size() for name, value in own.items()}
        queue_depth = mean_of_ranks(self.queued / max(1, self.steps))
        quarantined = mean_of_ranks(self.rows_quarantined) * world_size()
        shares = {"queue_depth": queue_depth, "quarantine_rate": quarantined / max(1.0, sums["rows"])}
        return {"wall_s": self.wall_s, **sums, **shares}


class TimedEncode:
    """Adds up the seconds that encoding takes; on a GPU by events, without waiting for it.

    Args:
        encode: Batch to tokens.
        device: Where it runs.
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
        if len(self._events) > _KEPT_EVENTS:
            self._collect()
        return tokens

    @property
    def seconds(self) -> float:
        """So far."""
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
