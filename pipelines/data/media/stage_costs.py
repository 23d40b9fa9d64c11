"""Costs of decoding and encoding rows: seconds of each stage and bytes fetched, measured where the work is done."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

Stage = Literal["fetch", "decode", "transform", "encode", "generate", "write"]


@dataclass(slots=True)
class StageCosts:
    """Seconds of work, summed over the measured rows: one, a batch, or a run. Not thread-safe."""

    fetch_s: float = 0.0
    """Time to read the file or the stored features. A child that decodes a local video reads it while decoding."""
    decode_s: float = 0.0
    transform_s: float = 0.0
    """Time to resize, crop and flip."""
    encode_s: float = 0.0
    """Time of the frozen encoders."""
    generate_s: float = 0.0
    """Time of the frozen language model to generate texts."""
    write_s: float = 0.0
    """Time to store features or texts."""
    fetched_bytes: int = 0
    """Bytes of the files or stored features that were read."""

    @contextlib.contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Add the time inside the `with` block to a stage, also when it raises."""
        begun_s = time.perf_counter()
        try:
            yield
        finally:
            name = f"{stage}_s"
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun_s)

    def add(self, other: "StageCosts") -> None:
        """Add other costs to these."""
        for name in COST_COLUMNS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, without stages that took none."""
        values = {name.removesuffix("_s"): getattr(self, name) for name in COST_COLUMNS if name.endswith("_s")}
        return {stage: value for stage, value in values.items() if value}


def cost_columns(costs: Iterable[StageCosts]) -> dict[str, pa.Array]:
    """Arrow columns with one entry a row; `sum_costs` adds them up."""
    rows = list(costs)
    return {name: pa.array([getattr(row, name) for row in rows], COST_COLUMNS[name]) for name in COST_COLUMNS}


def sum_costs(table: pa.Table) -> StageCosts:
    """Add up a table's cost columns."""
    values: dict[str, Any] = {name: pc.sum(table[name]).as_py() for name in COST_COLUMNS}
    return StageCosts(**{name: value or 0 for name, value in values.items()})


COST_COLUMNS: dict[str, pa.DataType] = {
    field.name: pa.float64() if field.name.endswith("_s") else pa.int64() for field in dataclasses.fields(StageCosts)
}
