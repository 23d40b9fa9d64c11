"""When, where and with what code something was run or measured."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = ("qformer", "pipelines", "jobs", "pyproject.toml", ":(exclude)jobs/bench/results")
_LIBRARIES = ("torch", "transformers", "timm", "peft", "ray", "pillow", "av", "decord", "torchcodec")


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What a figure or a run holds for."""

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
    words = f"{_processor()}, {num_usable_cpus()} cores"
    import torch

    return f"{words}, {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else words


def num_usable_cpus() -> int:
    """Logical cores that this process may run on: `taskset` leaves it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.machine()
