"""The page "Add a bridge", applied to a copy of the packages: its file and its lines are all that a bridge needs."""

import difflib
import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_ruff_and_mypy_take_the_page_s_code(copy, blocks):
    for command in (
        ["ruff", "check", "--config", str(REPOSITORY / "pyproject.toml"), blocks["file"], TABLE],
        ["ruff", "format", "--check", "--config", str(REPOSITORY / "pyproject.toml"), blocks["file"], TABLE],
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_kind_without_a_case_is_an_error(copy, blocks):
    """An unknown kind cannot become another one: `build_bridge` ends in `assert_never`."""
    code = (
        "from qformer.bridges.config import BaseBridgeConfig\n"
        "from qformer.bridges.table import build_bridge\n"
        "from qformer.config import QFormerConfig\n"
        "other = BaseBridgeConfig(kind='concatenate')\n"
        "try:\n    build_bridge(other, QFormerConfig(encoder_width=8))\n"
        "except AssertionError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment(copy), capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def run_cli(copy, *words, expected=0):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)],
        cwd=copy,
        env=environment(copy),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == expected, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands_take_the_bridge(copy, blocks):
    """Trained by `qformer train` on two workers in both stages, resumed, evaluated, looked at, served, not exported."""
    (copy / "bridge.yaml").write_text(blocks["yaml"], encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jobs.demo.toy"], cwd=copy, env=environment(copy), check=True)
    recipes = Path("jobs/configs/recipes")
    layers = [recipes / "toy.yaml", "bridge.yaml"]

    def train(recipe, output, *sets):
        words = [word for file in (recipes / recipe, *layers) for word in ("--config", file)]
        words += ["--set", f"output={output}", "--set", "workers=2", *(word for one in sets for word in ("--set", one))]
        return run_cli(copy, "train", *words)

    train("blip2_stage1.yaml", "runs/one", "init_from=null", "micro_batch=2", "steps=2", "checkpoint_every=2")
    train(
        "blip2_stage1.yaml",
        "runs/one",
        "init_from=null",
        "micro_batch=2",
        "steps=4",
        "checkpoint_every=2",
        "resume=true",
    )
    train("blip2_stage2_opt.yaml", "runs/two", "init_from=runs/one")
    manifest = "data.manifest=runs/toy/corpus/manifest.jsonl"
    for name in ("one", "two"):
        out = f"output=runs/evaluated-{name}"
        run_cli(copy, "evaluate", "--set", f"checkpoint=runs/{name}", "--set", manifest, "--set", out)
        told = run_cli(
            copy,
            "export",
            *("--set", f"checkpoint=runs/{name}", "--set", f"output=runs/exported-{name}"),
            expected=1,
        )
        assert "kind='weighted'" in told and "no place" in told
    run_cli(copy, "doctor", "--set", "run=runs/two", "--set", "rows=8", expected=None)
