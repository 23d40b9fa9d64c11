"""What a benchmark measured, as a table and as one JSON line."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field


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


def hardware() -> str:
    """This machine in a few words: processor and logical cores, and the GPU when torch sees one."""
    words = f"{_processor()}, {os.cpu_count()} cores"
    import torch

    return f"{words}, {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else words


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.machine()


def as_table(result: BenchResult) -> str:
    """Aligned columns: the raw seconds, then the ratios, then the rates."""
    rows = [(name, f"{value:.3f} s") for name, value in result.seconds.items()]
    rows += [(name, f"{value:.2f} x") for name, value in result.ratios.items()]
    rows += [(name, f"{value:.1f}") for name, value in result.rates.items()]
    name_width = max((len(name) for name, _ in rows), default=0)
    value_width = max((len(value) for _, value in rows), default=0)
    lines = [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in rows]
    return "\n".join([result.bench, "-" * max(map(len, [result.bench, *lines])), *lines])


def as_json(result: BenchResult, hardware: str) -> str:
    """One line that another program reads."""
    return json.dumps(
        {
            "bench": result.bench,
            "hardware": hardware,
            "seconds": dict(result.seconds),
            "ratios": dict(result.ratios),
            **({"rates": dict(result.rates)} if result.rates else {}),
        }
    )
