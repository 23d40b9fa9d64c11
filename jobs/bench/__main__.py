"""`python -m jobs.bench [NAME …] [--json] [--output FOLDER]`: run benchmarks; without a name, all of them.

A benchmark is a module of this package with `run() -> BenchResult`.
"""

import argparse
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jobs.bench
from jobs.bench.result import BenchResult, as_json, as_table, write_result
from jobs.cluster.environment import current_environment
from qformer.errors import UserError

_HELPER_MODULES = {
    "__main__",
    "result",
    "hf_stage1",
    "stage1_flops",
    "data_media",
    "data_memory",
    "data_peers",
    "train_torchrun",
    "serve_load",
    "serve_models",
    "serve_peer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all.

    Args:
        argv: Arguments after `python -m jobs.bench`; None: those of the process.

    Returns:
        Exit code: 0, or 2 if a name is unknown or the folder cannot be created.
    """
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measure this project and its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(bench_names()) or 'none yet'}")
    parser.add_argument("--json", action="store_true", help="end each benchmark with one line of JSON")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="also write each result to FOLDER/DATE-NAME-HARDWARE.json"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        names = [_checked(name) for name in arguments.names] or bench_names()
        if arguments.output is not None:
            _make_folder(arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not names:
        print("no benchmarks yet")
    for name in names:
        result: BenchResult = importlib.import_module(f"jobs.bench.{name}").run()
        print(as_table(result))
        environment = current_environment()
        if arguments.output is not None:
            print(f"written to {write_result(arguments.output, result, environment)}")
        if arguments.json:
            print(as_json(result, environment))
    return 0


def bench_names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(
        module.name for module in pkgutil.iter_modules(jobs.bench.__path__) if module.name not in _HELPER_MODULES
    )


def _make_folder(folder: Path) -> None:
    """Create the folder before the measurements, which may take minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made ({error.strerror}); choose another folder") from error


def _checked(name: str) -> str:
    known = bench_names()
    if name in known:
        return name
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(known) or 'none yet'}"
    raise UserError(f"unknown benchmark {name!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
