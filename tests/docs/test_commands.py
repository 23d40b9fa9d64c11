"""Every fenced block of README and docs: commands, settings and programs do what the pages say.

Cheap commands run as they stand, in a folder with small models; all others are checked as far as their settings, their
targets and their modules. A block that no rule covers fails. `test_slow_commands.py` runs the long ones.
"""

import asyncio
import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from jobs.bench.__main__ import bench_names
from jobs.cli import main as cli
from jobs.cli.catalogue import JOBS
from jobs.demo import toy
from jobs.settings.loading import load
from jobs.settings.train import TrainSettings
from pipelines.serving.contract.openapi import document
from tests.conftest import REPOSITORY
from tests.docs.blocks import all_blocks, blocks_in, is_applied_elsewhere
from tests.tiny_checkpoints import write_stage1, write_stage2

SHELL = blocks_in("sh")
RUN_HERE = {"caption", "export", "--make-key", "--write-config"}
"""Jobs, or flags of jobs, that run as they stand: they need no Ray and take a second."""
LANGUAGES = {"sh", "python", "yaml", "json", "text"}
SLOW_PYTHON = ("openai", "jobs.train")
MAKEFILE = (REPOSITORY / "Makefile").read_text()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A clone's folder as the pages assume it: settings files of the pages, photographs, runs."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "jobs").symlink_to(REPOSITORY / "jobs")
    for block in blocks_in("yaml"):
        if block.title:
            assert not (folder / block.title).exists(), f"{block}: another page has a file of this name"
            (folder / block.title).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toy.main([])  # `python -m jobs.demo.toy`
    corpus = folder / "runs" / "toy"
    (folder / "photos").mkdir()
    image = next(corpus.glob("corpus/**/*.jpg"))
    for name in ("photo.jpg", "photos/beach.jpg"):
        shutil.copy(image, folder / name)
    shutil.copy(next(corpus.glob("clips/**/*.mp4")), folder / "clip.mp4")
    write_stage1(folder / "runs" / "stage1")
    write_stage2(folder / "runs" / "stage2")
    write_stage2(folder / "runs" / "instruct", language=folder / "runs" / "stage2-language", seed=3, reads_prompt=True)
    return folder


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_of_the_pages_works(block, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert block.commands, "a block without a command"
    for words in block.commands:
        check(words)


def check(words):
    """Check one command by the first rule that covers it."""
    match words:
        case ["qformer", *rest] | [".venv/bin/qformer", *rest]:
            check_job(rest)
        case ["make", *rest]:
            check_make(rest)
        case ["python" | ".venv/bin/python", "-m", "pip", "install", "-e", target]:
            check_extra(target)
        case ["python" | ".venv/bin/python", "-m", module, *rest]:
            check_module(module, rest)
        case ["python", script, *options]:
            text = (REPOSITORY / script).read_text()
            assert all(option in text for option in options)
        case [".", ".venv/bin/activate"] | ["python3", "-m", "venv", ".venv"]:
            assert "BIN := .venv/bin" in MAKEFILE
        case ["touch", stamp]:
            assert f"STAMP := {stamp}\n" in MAKEFILE
        case ["curl", *rest]:
            check_curl(rest)
        case ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *rest]:
            assert re.fullmatch(r"http://\w+:8265", address)
            check(rest)
        case ["serve", "deploy", file]:
            assert yaml.safe_load(Path(file).read_text())["applications"], "written by the command before"
        case _:
            pytest.fail(f"no rule covers the command {words}; add one to check()")


def check_job(words):
    """Run a job of `qformer` that takes a second; have all others print the settings that they would run with."""
    if words == ["--help"]:
        assert cli.main(words) == 0
        return
    is_shown = "--show-config" in words
    if not is_shown and RUN_HERE & set(words) and "--manifest" not in words:
        assert cli.main(words) == 0
        return
    assert cli.main([*words, *([] if is_shown else ["--show-config"])]) == 0


def check_make(words):
    targets = {*re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE), *re.findall(r"STAMP := (\S+)", MAKEFILE)}
    variables = set(re.findall(r"^(\w+) \?=", MAKEFILE, flags=re.MULTILINE))
    named = [word for word in words if "=" not in word]
    assert named and set(named) <= targets
    assert {word.partition("=")[0] for word in words if "=" in word} <= variables


def check_extra(target):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)[1]
    assert set(extras.split(",") if extras else []) <= project["optional-dependencies"].keys()


def check_module(module, words):
    """`python -m`: a job, a benchmark, tests, or a module without options."""
    job = module.removeprefix("jobs.")
    if job in JOBS:
        check_job([job, *words])
    elif module == "jobs.bench":
        names = [word for word in words if not word.startswith("-") and "/" not in word]
        assert names and set(names) <= set(bench_names()), words
        assert {word for word in words if word.startswith("-")} <= {"--json", "--output"}
    elif module == "pytest":
        files = [word for word in words if word.startswith("tests/")]
        assert files and all((REPOSITORY / file).is_file() for file in files)
    else:
        assert not words and importlib.util.find_spec(module).origin.startswith(str(REPOSITORY))


def check_curl(words):
    url = next(word for word in words if word.startswith("http"))
    path = url.removeprefix("http://127.0.0.1:8000")
    paths = json.loads(asyncio.run(document(None)).body)["paths"]
    assert "post" in paths[path]
    photo = Path(words[words.index("--data-binary") + 1].removeprefix("@"))
    assert photo.read_bytes()[:2] == b"\xff\xd8", "a JPEG"


@pytest.mark.parametrize("block", blocks_in("yaml"), ids=str)
def test_every_settings_file_of_the_pages_loads(block, workspace):
    """A file with a title is read by the commands that name it; the rest are parts of stage1.yaml."""
    if block.title:
        users = [words for shell in SHELL for words in shell.commands if block.title in words]
        assert users, f"no command reads {block.title}"
        return
    part = workspace / "part.yaml"
    part.write_text(block.text)
    base = workspace / ("jobs/configs/examples/photos.yaml" if block.page == "README.md" else "stage1.yaml")
    plain, changed = load(TrainSettings, base), load(TrainSettings, [base, part])
    assert plain != changed


@pytest.mark.parametrize(
    "block", [block for block in blocks_in("python") if not any(word in block.text for word in SLOW_PYTHON)], ids=str
)
def test_every_program_of_the_pages_runs(block, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    exec(compile(block.text, str(block), "exec"), {"__name__": "page"})  # noqa: S102
    assert capsys.readouterr().out.strip()


def test_blocks_of_json_hold_one_row_a_line():
    for block in blocks_in("json"):
        for line in block.text.splitlines():
            assert json.loads(line)["captions"], str(block)


def test_every_block_is_of_a_language_that_a_test_covers():
    others = [block for block in all_blocks() if is_applied_elsewhere(block)]
    assert {block.language for block in all_blocks()} - {block.language for block in others} <= LANGUAGES
    if others:  # the test that adds the toy bridge reads its files and lines from the page
        assert any("add-a-bridge.md" in file.read_text() for file in (REPOSITORY / "tests").rglob("test_*bridge*.py"))
    commands = re.compile(r"^\s*(qformer|make|curl|python|pip) ", flags=re.MULTILINE)
    hidden = [str(block) for block in all_blocks() if block.language == "text" and commands.search(block.text)]
    assert not hidden, "commands in a text block are not run"


def test_the_unknown_key_of_the_start_page_gives_the_error_shown_there(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    block = next(block for block in blocks_in("text") if block.page == "docs/index.md")
    command, error = block.text.splitlines()
    assert cli.main(command.removeprefix("$ qformer ").split()) == 2
    assert capsys.readouterr().err.strip() == error
