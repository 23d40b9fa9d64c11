"""What a feature cache will take, before it is written: bytes by formula, seconds from a few measured rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.data import schema
from pipelines.data.batches.stage_report import format_bytes
from pipelines.data.features.spec import FeatureSpec
from pipelines.data.media.stage_costs import StageCosts

_MEASURED_ROWS = 16
"""Rows of each kind that are measured, spread evenly over the missing ones."""
_WORTH_MEASURING = 10
"""Jobs shorter than this many measurements are done sooner than forecast."""
_ROW_OVERHEAD_BYTES = 1000
"""Of a record batch's header and the row's places in the lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Of the rows that are still missing."""

    rows: int
    size_bytes: int
    decode_s: float | None
    """Seconds that the decode workers will take, None when that was not measured."""
    encode_s: float | None
    """Seconds that the encoder workers will take; both work at the same time."""

    @property
    def total_s(self) -> float | None:
        """Length of the job without its start."""
        return None if self.decode_s is None or self.encode_s is None else max(self.decode_s, self.encode_s)

    def __str__(self) -> str:
        text = f"forecast: {self.rows} rows, {format_bytes(self.size_bytes)}"
        if self.total_s is None:
            return f"{text} (too few rows to measure the time)"
        assert self.decode_s is not None and self.encode_s is not None
        slower = "decoding" if self.decode_s > self.encode_s else "encoding"
        rate = self.rows / max(self.total_s, 1e-9)
        return f"{text}, {_duration(self.total_s)} at {rate:.3g} rows/s, held up by {slower}"


def measured_blocks(missing: Sequence[pa.Table]) -> list[pa.Table]:
    """Small blocks that stand for the missing shards, one of each kind that is worth measuring."""
    blocks = []
    for kind in schema.KINDS:
        of_kind = [block for block in missing if block[schema.KIND][0].as_py() == kind]
        count = sum(map(len, of_kind))
        if count >= _MEASURED_ROWS * _WORTH_MEASURING:
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
    """Scale what was measured to all missing rows.

    Args:
        missing: Shards to be written.
        spec: What they hold.
        measured: Blocks of `measured_blocks` with their costs.
        decode_workers: That will share the decoding.
        workers: That will share the encoding.
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
