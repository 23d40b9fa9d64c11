"""Write the generated pages: every setting of every job, and the recorded benchmarks.

`python docs/generate.py` writes them; with `--check` it writes nothing and exits with 1 where one is out of date.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from jobs.cli.catalogue import JOBS, Job
from jobs.settings.help import Key, as_yaml, model_keys

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "jobs" / "bench" / "results"
NOTE = "<!-- Written by docs/generate.py; change the sources, then run `make docs`. -->"


def settings_page() -> str:
    """Every key of every job."""
    parts = [
        NOTE,
        "# Settings",
        "Every key of every job, with its default. A key with dots lies in a nested mapping: `optim.learning_rate` is "
        "`learning_rate` under `optim` in YAML, and `--set optim.learning_rate=1e-4` on the command line. A number "
        "stands for the position in a list, counted from 0. `qformer JOB --show-config` prints what a file and its "
        "overrides mean, and runs nothing.",
    ]
    for name, job in JOBS.items():
        parts += _job_section(f"qformer {name}", job)
        for option in job.options:
            if option.job is not None:
                parts += _job_section(f"qformer {name} {option.flag}", option.job)
    return "\n\n".join(parts) + "\n"


def _job_section(title: str, job: Job) -> list[str]:
    module, _, name = job.settings.partition(":")
    keys = list(model_keys(getattr(importlib.import_module(module), name)))
    summary = f"{job.summary[0].upper()}{job.summary[1:]}."
    rows = ["| key | default | meaning |", "|---|---|---|", *map(_row, keys)]
    return [f"## {title}", summary, "\n".join(rows)]


def _row(key: Key) -> str:
    condition = f"*{key.condition}* " if key.condition else ""
    default = "required" if key.default is PydanticUndefined else f"`{as_yaml(key.default)}`"
    return f"| `{key.name}` | {default} | {condition}{_cell(key.text)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


BENCHMARKS = {
    "data": "Reads 1080p JPEGs and H.264 clips, in turns with torch DataLoaders over Pillow, decord, PyAV and, if "
    "installed, TorchCodec; two processes each.",
    "stage1": "One step of stage 1, in turns with the step built from Hugging Face's modules: fp32 on a CPU, bf16 on "
    "a GPU. Operations follow from the shapes, so recomputation does not count as work.",
    "step": "The training loop on batches in memory, with ViT-g, a Q-Former of BERT-base size and 256 images a step, "
    "without Ray. `cached` reads stored encoder outputs; `mfu` is the share of the card's dense 16-bit peak.",
    "engine": "A queue of requests with answers of 8 to 128 tokens, in turns with `transformers` generate in static "
    "batches; on a GPU with a model of OPT-2.7B's size. Weights are random.",
    "video": "Clips of 8, 16 and 64 frames through every bridge, each in a process of its own: the forward pass, a "
    "training step and peak memory.",
    "train": "A small stage 1 through Ray, in turns with torchrun and a torch DataLoader, on two CPU ranks each; then "
    "on a feature cache.",
    "serve": "The demo's frozen models behind Ray Serve, and beside them on the same HTTP proxy a loop over "
    "`transformers` that answers one request at a time.",
}
"""What each benchmark measures; the page lists them in this order."""


def benchmarks_page() -> str:
    """The recorded figures of every benchmark."""
    parts = [
        NOTE,
        "# Benchmarks",
        "Each benchmark measures this project and its peers in one run on one machine. The files in "
        "`jobs/bench/results` hold the figures below with the versions of all libraries. Figures of other machines, "
        "and of a machine that does other work meanwhile, differ. `make bench` runs all benchmarks; "
        "[contributing](contributing.md#benchmarks) says how to record one.",
    ]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    for name, text in BENCHMARKS.items():
        parts += [f"## {name}", text, f"```sh\npython -m jobs.bench {name} --json\n```"]
        for result in results:
            if result["bench"] == name:
                parts += [f"### {result['hardware']}, {result['date']} {{ #{_anchor(result)} }}", _figures(result)]
    return "\n\n".join(parts) + "\n"


def _anchor(result: Mapping[str, Any]) -> str:
    words = f"{result['bench']} {result['date']} {result['hardware']}".lower()
    return "-".join("".join(letter if letter.isalnum() else " " for letter in words).split())


def _figures(result: Mapping[str, Any]) -> str:
    rows = [f"Commit `{result['commit']}`.", "", "| figure | value |", "|---|---|"]
    for name, value in result.get("seconds", {}).items():
        rows.append(f"| {name} | {_number(value * 1000)} ms |" if value < 1 else f"| {name} | {_number(value)} s |")
    rows += [f"| {name.replace('_', ' ')} | {_number(value)} |" for name, value in result.get("ratios", {}).items()]
    rows += [f"| {name} | {_number(value)} |" for name, value in result.get("rates", {}).items()]
    return "\n".join(rows)


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


PAGES = {"settings.md": settings_page, "benchmarks.md": benchmarks_page}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated pages of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    is_check = parser.parse_args(arguments).check
    is_stale = False
    for name, build in PAGES.items():
        file, text = DOCS / name, build()
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        if is_check:
            print(f"docs/{name} is out of date; run `make docs`, or `python docs/generate.py`", file=sys.stderr)
            is_stale = True
        else:
            file.write_text(text, encoding="utf-8")
            print(f"written: docs/{name}")
    return int(is_stale)


if __name__ == "__main__":
    sys.exit(main())
