"""Benchmarks' form: the table, the JSON line, the names."""

import importlib
import json

import pytest

import jobs.bench
from jobs.bench.__main__ import bench_names, main
from jobs.bench.result import BenchResult, as_json, as_table, hardware

RESULT = BenchResult(bench="decode", seconds={"ours": 1.5, "peer": 30.0}, ratios={"peer/ours": 20.0})


def test_table():
    assert as_table(RESULT).splitlines() == [
        "decode",
        "-------------------",
        "ours        1.500 s",
        "peer       30.000 s",
        "peer/ours   20.00 x",
    ]


def test_json_is_one_line_with_the_agreed_keys():
    line = as_json(RESULT, "a box")
    assert "\n" not in line
    assert json.loads(line) == {
        "bench": "decode",
        "hardware": "a box",
        "seconds": {"ours": 1.5, "peer": 30.0},
        "ratios": {"peer/ours": 20.0},
    }


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_figure_must_be_a_positive_number(value):
    with pytest.raises(ValueError, match="no positive number"):
        BenchResult(bench="decode", seconds={"ours": value}, ratios={})


def test_hardware_names_the_cores():
    assert " cores" in hardware()


def test_a_module_with_run_is_found_and_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "sleeping.py").write_text(
        "from jobs.bench.result import BenchResult\n"
        "def run():\n    return BenchResult(bench='sleeping', seconds={'a': 1.0}, ratios={'k': 2.0})\n"
    )
    monkeypatch.setattr(jobs.bench, "__path__", [*jobs.bench.__path__, str(tmp_path)])
    assert "sleeping" in bench_names()
    assert main(["sleeping", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"] == {"k": 2.0}
    assert main(["sleping"]) == 2
    assert "did you mean 'sleeping'?" in capsys.readouterr().err


def test_every_benchmark_has_run():
    for name in bench_names():
        assert callable(importlib.import_module(f"jobs.bench.{name}").run)
