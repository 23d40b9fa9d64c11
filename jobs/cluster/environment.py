"""Description of the environment of a run or a measurement: date, commit, hardware, library versions."""

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
class RunEnvironment:
    """Environment of a run or a measurement."""

    date: str
    """UTC day, such as 2026-11-21."""
    commit: str | None
    """Short hash of the checkout, with "-dirty" if the code differs from it; None outside a checkout."""
    hardware: str
    versions: Mapping[str, str]
    """Versions of Python and of the installed libraries."""


def current_environment() -> RunEnvironment:
    """Describe the current environment."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return RunEnvironment(
        date=datetime.now(UTC).date().isoformat(), commit=commit(ROOT), hardware=hardware(), versions=versions
    )


def commit(root: Path) -> str | None:
    """Hash of a checkout for `RunEnvironment.commit`; new code files count as a difference, results do not."""
    if not (root / ".git").exists():
        return None  # a parent folder may be the checkout of another project

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        is_dirty = bool(git("status", "--porcelain", "--", *_CODE))
        return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> str:
    """Short description of this machine: processor, logical cores, and the GPU if torch finds one."""
    words = f"{_processor()}, {num_usable_cpus()} cores"
    import torch

    return f"{words}, {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else words


def num_usable_cpus() -> int:
    """Number of logical cores that this process may use; `taskset` can reduce it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.machine()
