"""What a benchmark measured, as a table and as one JSON line."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jobs.cluster.environment import RunEnvironment


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """Ours and the peers, measured in one run on one machine.

    Raises:
        ValueError: If a figure is not a positive number.
    """

    bench: str
    seconds: Mapping[str, float]
    """Raw wall-clock seconds, one entry per measured thing."""
    ratios: Mapping[str, float]
    """The figures that matter, e.g. peer's seconds / ours; above 1 we are faster."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """What is done in a time, the unit at the end of the name: "encode images/s"."""

    def __post_init__(self) -> None:
        for name, value in {**self.seconds, **self.ratios, **self.rates}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"benchmark {self.bench}: {name}={value} is no positive number")


def as_table(result: BenchResult) -> str:
    """Aligned columns: the raw seconds, then the ratios, then the rates."""
    rows = [(name, f"{value:.3f} s") for name, value in result.seconds.items()]
    rows += [(name, f"{value:.2f} {'ms' if name.endswith('_ms') else 'x'}") for name, value in result.ratios.items()]
    rows += [(name, f"{value:.1f}") for name, value in result.rates.items()]
    name_width = max((len(name) for name, _ in rows), default=0)
    value_width = max((len(value) for _, value in rows), default=0)
    lines = [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in rows]
    return "\n".join([result.bench, "-" * max(map(len, [result.bench, *lines])), *lines])


def as_json(result: BenchResult, current_environment: RunEnvironment, indent: int | None = None) -> str:
    """One line that another program reads; with `indent`, several that a person does."""
    rates = {"rates": dict(result.rates)} if result.rates else {}
    figures = {"seconds": dict(result.seconds), "ratios": dict(result.ratios), **rates}
    return json.dumps({"bench": result.bench, **asdict(current_environment), **figures}, indent=indent)


def write_result(folder: Path, result: BenchResult, current_environment: RunEnvironment) -> Path:
    """Write DATE-BENCH-HARDWARE.json; a later run of the day on the same machine takes its place."""
    words = re.sub(r"\((r|tm)\)", "", current_environment.hardware.lower())
    machine = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    file = folder / f"{current_environment.date}-{result.bench}-{machine}.json"
    file.write_text(as_json(result, current_environment, indent=2) + "\n")
    return file
