"""The page "Add a bridge", applied to a copy of the packages: its file and its lines are all that a bridge needs."""

import base64
import contextlib
import difflib
import filecmp
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pipelines.training.records.metrics_log import read_metrics
from tests.conftest import REPOSITORY
from tests.docs.blocks import blocks_of

PAGE = REPOSITORY / "docs" / "add-a-bridge.md"
TABLE = "qformer/bridges/table.py"
PACKAGES = ("qformer", "pipelines", "jobs")


@pytest.fixture(scope="module")
def blocks():
    found = {block.title or block.language: block for block in blocks_of(PAGE)}
    (file,) = (title for title in found if title.startswith("qformer/bridges/") and title != TABLE)
    return {"file": file, "code": found[file].text, "table": found[TABLE].text, "yaml": found["yaml"].text}


@pytest.fixture(scope="module")
def copy(tmp_path_factory, blocks):
    """The packages with the page's bridge."""
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / blocks["file"]).write_text(blocks["code"], encoding="utf-8")
    table = folder / TABLE
    table.write_text(patched(table.read_text(encoding="utf-8"), blocks["table"]), encoding="utf-8")
    return folder


def patched(text, diff):
    """Apply a diff whose parts stand between "@@": each part's old lines occur once."""
    for part in diff.split("@@\n"):
        lines = part.splitlines()
        assert all(line[0] in " +" for line in lines), "the page adds lines and takes none away"
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
        new = "".join(f"{line[1:]}\n" for line in lines)
        assert text.count(old) == 1, f"the page's lines do not fit the table: {old!r}"
        text = text.replace(old, new)
    return text


def differences(ours, theirs, prefix=""):
    """Files that differ or stand on one side only."""
    compared = filecmp.dircmp(ours, theirs, ignore=["__pycache__"])
    found = {prefix + name for name in (*compared.left_only, *compared.right_only)}
    _, changed, errors = filecmp.cmpfiles(ours, theirs, compared.common_files, shallow=False)
    found |= {prefix + name for name in (*changed, *errors)}
    for name in compared.common_dirs:
        found |= differences(ours / name, theirs / name, f"{prefix}{name}/")
    return found


def test_the_copy_differs_by_the_file_and_the_lines_alone(copy, blocks):
    found = set()
    for package in PACKAGES:
        found |= differences(REPOSITORY / package, copy / package, f"{package}/")
    assert found == {blocks["file"], TABLE}
    before, after = ((root / TABLE).read_text(encoding="utf-8").splitlines() for root in (REPOSITORY, copy))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    added = [line for line in blocks["table"].splitlines() if line[0] == "+"]
    assert [line[2:] for line in changed if line[0] == "+"] == [line[1:] for line in added]
    assert all(line[0] == "+" for line in changed) and len(added) == 4


def environment(*folders):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}


def test_the_bridge_trains_resumes_is_used_and_served_and_is_not_exported(copy, blocks, tmp_path):
    (tmp_path / "bridge.yaml").write_text(blocks["yaml"], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.qformer.bridges.toy_bridge", str(tmp_path), str(copy)],
        cwd=copy,
        env=environment(copy, REPOSITORY),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-2000:] + done.stderr[-4000:]


def test_ruff_takes_the_page_s_code(copy, blocks):
    settings = ("--config", str(REPOSITORY / "pyproject.toml"), blocks["file"], TABLE)
    for command in (("check", *settings), ("format", "--check", *settings)):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_takes_the_page_s_code_and_misses_a_case(copy, tmp_path):
    """A kind in the union without a case of `build_bridge` cannot become another one."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(REPOSITORY / "pyproject.toml"),
        "-p",
        "qformer.bridges",
    ]
    command += ["--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    table = copy / TABLE
    text = table.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    case = next(number for number, line in enumerate(lines) if "case WeightedConfig()" in line)
    table.write_text("".join(lines[:case] + lines[case + 2 :]), encoding="utf-8")
    try:
        done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    finally:
        table.write_text(text, encoding="utf-8")
    assert done.returncode == 1 and "assert_never" in done.stdout and "WeightedConfig" in done.stdout, done.stdout


def run_cli(copy, *words, expected=(0,)):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)],
        cwd=copy,
        env=environment(copy),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in expected, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def assigned(*values):
    return [word for value in values for word in ("--set", value)]


def train_toy(copy, recipe, *values):
    recipes = Path("jobs/configs/recipes")
    files = [word for file in (recipes / recipe, recipes / "toy.yaml", "bridge.yaml") for word in ("--config", file)]
    return run_cli(copy, "train", *files, *assigned("workers=2", "data.num_frames=3", *values))


@contextlib.contextmanager
def service(copy, *values):
    """A running `qformer serve`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jobs.cli", "serve", *assigned(f"port={port}", *values)]
    process = subprocess.Popen(command, cwd=copy, env=environment(copy))
    try:
        url, until_s = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < until_s
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


@pytest.mark.slow
def test_the_commands_take_the_bridge(copy, blocks):
    """Trained by two workers in both stages, resumed, evaluated, inspected and served; export refuses it by name."""
    (copy / "bridge.yaml").write_text(blocks["yaml"], encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jobs.demo.toy"], cwd=copy, env=environment(copy), check=True)
    first = ("output=runs/one", "init_from=null", "micro_batch=2", "checkpoint_every=2")
    train_toy(copy, "blip2_stage1.yaml", *first, "steps=2")
    train_toy(copy, "blip2_stage1.yaml", *first, "steps=4", "resume=true")
    train_toy(copy, "blip2_stage2_opt.yaml", "output=runs/two", "init_from=runs/one")
    manifest = "data.manifest=runs/toy/corpus/manifest.jsonl"
    for name in ("one", "two"):
        records = read_metrics(str(copy / "runs" / name))
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        assert all(0 < record["loss/peak"] <= 1 for record in records)
        given = (f"checkpoint=runs/{name}", f"output=runs/evaluated-{name}", manifest, "data.split=train")
        run_cli(copy, "evaluate", *assigned(*given))
        told = run_cli(
            copy, "export", *assigned(f"checkpoint=runs/{name}", f"output=runs/exported-{name}"), expected=(2,)
        )
        assert "kind='weighted'" in told and "no place" in told
        told = run_cli(copy, "doctor", f"runs/{name}", *assigned("rows=16"), expected=(0, 1))
        assert "queries" in told and "Traceback" not in told
    picture = next((copy / "runs/toy/corpus").rglob("*.jpg"))
    with service(copy, "checkpoint=runs/two", "adapters={search: runs/one}") as url:
        answer = httpx.post(f"{url}/v1/caption", content=picture.read_bytes(), headers={"Content-Type": "image/*"})
        assert answer.status_code == 200 and answer.json()["kind"] == "image", answer.text
        match = {"image": base64.b64encode(picture.read_bytes()).decode(), "texts": ["a red circle"], "model": "search"}
        answer = httpx.post(f"{url}/v1/match", json=match)
        assert answer.status_code == 200, answer.text
