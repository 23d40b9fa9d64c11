"""`python -m jobs.bench [NAME …] [--json]`: run benchmarks; without a name, all of them.

A benchmark is a module of this package with `run() -> BenchResult`.
"""

import argparse
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import jobs.bench
from jobs.bench.result import BenchResult, as_json, as_table, hardware
from qformer.errors import UserError

_NO_BENCHES = {
    "__main__",
    "result",
    "hf_stage1",
    "stage1_flops",
    "data_media",
    "data_memory",
    "data_peers",
    "train_torchrun",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all.

    Args:
        argv: Words after `python -m jobs.bench`; None takes the process's own.

    Returns:
        0, or 2 when a name is unknown.
    """
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measure ours beside the peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(bench_names()) or 'none yet'}")
    parser.add_argument("--json", action="store_true", help="end each benchmark with one line of JSON")
    arguments = parser.parse_intermixed_args(argv)
    try:
        names = [_checked(name) for name in arguments.names] or bench_names()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not names:
        print("no benchmarks yet")
    for name in names:
        result: BenchResult = importlib.import_module(f"jobs.bench.{name}").run()
        print(as_table(result))
        if arguments.json:
            print(as_json(result, hardware()))
    return 0


def bench_names() -> list[str]:
    """The benchmarks that exist, by their modules' names."""
    return sorted(module.name for module in pkgutil.iter_modules(jobs.bench.__path__) if module.name not in _NO_BENCHES)


def _checked(name: str) -> str:
    known = bench_names()
    if name in known:
        return name
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(known) or 'none yet'}"
    raise UserError(f"unknown benchmark {name!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
