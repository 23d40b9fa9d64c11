"""Result of a benchmark, as a table and as JSON."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jobs.cluster.environment import RunEnvironment


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """Figures of this project and its peers, measured in one run on one machine.

    Raises:
        ValueError: If a figure is not a positive number.
    """

    bench: str
    seconds: Mapping[str, float]
    """Wall-clock seconds by name of the measurement."""
    ratios: Mapping[str, float]
    """Ratios by name, e.g. seconds of the peer / ours, where above 1 means that ours is faster."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Rates by name, which ends in the unit: "encode images/s"."""

    def __post_init__(self) -> None:
        for name, value in {**self.seconds, **self.ratios, **self.rates}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"benchmark {self.bench}: {name}={value} is no positive number")


def as_table(result: BenchResult) -> str:
    """Format as aligned columns: seconds, then ratios, then rates."""
    rows = [(name, f"{value:.3f} s") for name, value in result.seconds.items()]
    rows += [(name, f"{value:.2f} {'ms' if name.endswith('_ms') else 'x'}") for name, value in result.ratios.items()]
    rows += [(name, f"{value:.1f}") for name, value in result.rates.items()]
    name_width = max((len(name) for name, _ in rows), default=0)
    value_width = max((len(value) for _, value in rows), default=0)
    lines = [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in rows]
    return "\n".join([result.bench, "-" * max(map(len, [result.bench, *lines])), *lines])


def as_json(result: BenchResult, environment: RunEnvironment, indent: int | None = None) -> str:
    """Format as JSON: one line, or several with `indent`."""
    rates = {"rates": dict(result.rates)} if result.rates else {}
    figures = {"seconds": dict(result.seconds), "ratios": dict(result.ratios), **rates}
    return json.dumps({"bench": result.bench, **asdict(environment), **figures}, indent=indent)


def write_result(folder: Path, result: BenchResult, environment: RunEnvironment) -> Path:
    """Write DATE-BENCH-HARDWARE.json; a later run on the same day and machine replaces it."""
    words = re.sub(r"\((r|tm)\)", "", environment.hardware.lower())
    machine = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    file = folder / f"{environment.date}-{result.bench}-{machine}.json"
    file.write_text(as_json(result, environment, indent=2) + "\n")
    return file
