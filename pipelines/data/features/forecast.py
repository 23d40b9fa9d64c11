"""Estimate of a feature cache before it is written: bytes by formula, seconds from a few measured rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.data import schema
from pipelines.data.batches.stage_report import format_bytes
from pipelines.data.features.spec import FeatureSpec
from pipelines.data.media.stage_costs import StageCosts

_MEASURED_ROWS = 16
"""Number of rows measured of each kind, spread evenly over the missing ones."""
_MIN_MEASUREMENTS = 10
"""Jobs shorter than this many measurements are not measured, because they finish sooner than a forecast."""
_ROW_OVERHEAD_BYTES = 1000
"""Bytes of a record batch's header and of the row's entries in the lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Estimate for the rows that are still missing."""

    rows: int
    size_bytes: int
    decode_s: float | None
    """Seconds of the decode workers; None if not measured."""
    encode_s: float | None
    """Seconds of the encoder workers, which run at the same time; None if not measured."""

    @property
    def total_s(self) -> float | None:
        """Duration of the job without its start."""
        return None if self.decode_s is None or self.encode_s is None else max(self.decode_s, self.encode_s)

    def __str__(self) -> str:
        text = f"forecast: {self.rows} rows, {format_bytes(self.size_bytes)}"
        if self.total_s is None:
            return f"{text} (too few rows to measure the time)"
        assert self.decode_s is not None and self.encode_s is not None
        slower = "decoding" if self.decode_s > self.encode_s else "encoding"
        rate = self.rows / max(self.total_s, 1e-9)
        return f"{text}, {_duration(self.total_s)} at {rate:.3g} rows/s, limited by {slower}"


def measured_blocks(missing: Sequence[pa.Table]) -> list[pa.Table]:
    """Small blocks that represent the missing shards, one for each kind with enough rows."""
    blocks = []
    for kind in schema.KINDS:
        of_kind = [block for block in missing if block[schema.KIND][0].as_py() == kind]
        count = sum(map(len, of_kind))
        if count >= _MEASURED_ROWS * _MIN_MEASUREMENTS:
            rows = np.linspace(0, count - 1, _MEASURED_ROWS).astype(np.int64)
            blocks.append(pa.concat_tables(of_kind).take(pa.array(rows)))
    return blocks


def forecast(
    missing: Sequence[pa.Table],
    spec: FeatureSpec,
    measured: Sequence[tuple[pa.Table, StageCosts]],
    *,
    decode_workers: int,
    workers: int,
) -> Forecast:
    """Scale measured costs to all missing rows.

    Args:
        missing: Shards to write.
        spec: Spec of the cache.
        measured: Blocks of `measured_blocks` with their costs.
        decode_workers: Number of decode workers.
        workers: Number of encoder workers.
    """
    counts = dict.fromkeys(schema.KINDS, 0)
    for block in missing:
        counts[block[schema.KIND][0].as_py()] += len(block)
    size_bytes = sum((spec.row_bytes(kind) + _ROW_OVERHEAD_BYTES) * count for kind, count in counts.items())
    decode_s = encode_s = 0.0
    for block, costs in measured:
        scale = counts[block[schema.KIND][0].as_py()] / len(block)
        decode_s += scale * (costs.fetch_s + costs.decode_s + costs.transform_s) / decode_workers
        encode_s += scale * (costs.encode_s + costs.write_s) / workers
    is_measured = bool(measured)
    return Forecast(
        rows=sum(counts.values()),
        size_bytes=size_bytes,
        decode_s=decode_s if is_measured else None,
        encode_s=encode_s if is_measured else None,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
