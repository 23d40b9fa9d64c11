"""Benchmarks' form: the table, the JSON line, the names."""

import importlib
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import torch

import jobs.bench
from jobs.bench.__main__ import bench_names, main
from jobs.bench.result import BenchResult, as_json, as_table, write_result
from jobs.cluster.environment import RunEnvironment, commit, current_environment, hardware

BOX = RunEnvironment(
    date="2026-11-21",
    commit="abc1234",
    hardware="Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores",
    versions={"torch": "2.13.0"},
)
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
    line = as_json(RESULT, BOX)
    assert "\n" not in line
    assert json.loads(line) == {
        "bench": "decode",
        "date": "2026-11-21",
        "commit": "abc1234",
        "hardware": "Intel(R) Xeon(R) CPU @ 2.20GHz, 2 cores",
        "versions": {"torch": "2.13.0"},
        "seconds": {"ours": 1.5, "peer": 30.0},
        "ratios": {"peer/ours": 20.0},
    }


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_figure_must_be_a_positive_number(value):
    with pytest.raises(ValueError, match="no positive number"):
        BenchResult(bench="decode", seconds={"ours": value}, ratios={})


def test_hardware_names_the_cores_that_there_are_to_use():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from jobs.cluster.environment import hardware; print(hardware())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ", 1 cores" in done.stdout and f", {len(os.sched_getaffinity(0))} cores" in hardware()


def test_a_result_is_kept_under_its_date_and_machine(tmp_path):
    file = write_result(tmp_path, RESULT, BOX)
    assert file.name == "2026-11-21-decode-intel-xeon-cpu-2-20ghz-2-cores.json"
    assert json.loads(file.read_text()) == json.loads(as_json(RESULT, BOX))


def test_circumstances_are_todays():
    before = datetime.now(UTC).date().isoformat()
    found = current_environment()
    assert before <= found.date <= datetime.now(UTC).date().isoformat() and found.hardware == hardware()
    assert found.versions["torch"] == torch.__version__ and found.versions["python"].startswith("3.")
    assert found.commit is None or re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", found.commit)


def test_the_commit_tells_of_changed_and_new_code(tmp_path):
    assert commit(tmp_path) is None

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    assert commit(tmp_path) is None  # no commit yet
    (tmp_path / "jobs/bench/results").mkdir(parents=True)
    code = tmp_path / "jobs" / "code.py"
    code.write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    clean = git("rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == clean
    assert commit(tmp_path / "jobs") is None  # what lies in a checkout is none
    (tmp_path / "jobs/bench/results/one.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("no code")
    assert commit(tmp_path) == clean
    code.write_text("two")
    assert commit(tmp_path) == f"{clean}-dirty"
    git("checkout", ".")
    (tmp_path / "jobs" / "new.py").write_text("new")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_a_module_with_run_is_found_and_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "sleeping.py").write_text(
        "from jobs.bench.result import BenchResult\n"
        "def run():\n    return BenchResult(bench='sleeping', seconds={'a': 1.0}, ratios={'k': 2.0})\n"
    )
    monkeypatch.setattr(jobs.bench, "__path__", [*jobs.bench.__path__, str(tmp_path)])
    assert "sleeping" in bench_names()
    assert main(["sleeping", "--json", "--output", str(tmp_path / "new" / "results")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["ratios"] == {"k": 2.0} and printed.keys() >= {"date", "commit", "hardware", "versions"}
    (file,) = (tmp_path / "new" / "results").iterdir()
    assert json.loads(file.read_text()) == printed and file.name.startswith(f"{printed['date']}-sleeping-")
    assert main(["sleeping", "--output", str(tmp_path / "sleeping.py")]) == 2
    assert "sleeping.py cannot be made" in capsys.readouterr().err
    assert main(["sleping"]) == 2
    assert "did you mean 'sleeping'?" in capsys.readouterr().err


def test_every_benchmark_has_run():
    for name in bench_names():
        assert callable(importlib.import_module(f"jobs.bench.{name}").run)
