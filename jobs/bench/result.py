"""What a benchmark measured, as a table and as one JSON line, and when, where and with what it did."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = ("qformer", "pipelines", "jobs", "pyproject.toml", ":(exclude)jobs/bench/results")
_LIBRARIES = ("torch", "transformers", "timm", "peft", "ray", "pillow", "av", "decord")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What a figure holds for."""

    date: str
    """UTC day, 2026-11-21."""
    commit: str | None
    """Short hash of the checkout, with "-dirty" where the code differs from it; None outside a checkout."""
    hardware: str
    versions: Mapping[str, str]
    """Of Python and of the libraries that are installed."""


def circumstances() -> Circumstances:
    """Today, this checkout and this machine."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Circumstances(
        date=datetime.now(UTC).date().isoformat(), commit=commit(ROOT), hardware=hardware(), versions=versions
    )


def commit(root: Path) -> str | None:
    """See `Circumstances.commit`; new files of code count as a difference, results do not."""
    if not (root / ".git").exists():
        return None  # a folder above may be another project's checkout

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        is_dirty = bool(git("status", "--porcelain", "--", *_CODE))
        return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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


def as_json(result: BenchResult, circumstances: Circumstances, indent: int | None = None) -> str:
    """One line that another program reads; with `indent`, several that a person does."""
    rates = {"rates": dict(result.rates)} if result.rates else {}
    figures = {"seconds": dict(result.seconds), "ratios": dict(result.ratios), **rates}
    return json.dumps({"bench": result.bench, **asdict(circumstances), **figures}, indent=indent)


def write_result(folder: Path, result: BenchResult, circumstances: Circumstances) -> Path:
    """Write DATE-BENCH-HARDWARE.json; a later run of the day on the same machine takes its place."""
    words = re.sub(r"\((r|tm)\)", "", circumstances.hardware.lower())
    machine = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    file = folder / f"{circumstances.date}-{result.bench}-{machine}.json"
    file.write_text(as_json(result, circumstances, indent=2) + "\n")
    return file
