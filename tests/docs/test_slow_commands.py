"""The long commands of the pages, as they stand: a person's own photographs, the served model, the recipes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml

from jobs.cli import main as cli
from jobs.demo import toy
from tests.conftest import REPOSITORY
from tests.docs.blocks import blocks_in

pytestmark = pytest.mark.slow
SIX = next(block for block in blocks_in("sh") if block.page == "README.md" and "photos.yaml" in block.text)
RECIPES = next(block for block in blocks_in("sh") if block.page == "docs/recipes.md" and "jobs.demo.toy" in block.text)
CLIENT = next(block for block in blocks_in("python") if "openai" in block.text)
TRAINING = next(block for block in blocks_in("python") if "jobs.train" in block.text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, test_data_dir):
    """The files of a bare clone, an environment in place, and a folder of captioned photographs."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    for name in filter(None, files.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    write_environment(folder)
    write_photographs(folder / "photos", test_data_dir / "captioned" / "captions.jsonl")
    return folder


def write_environment(folder):
    """What `make .venv/.installed` would make, of this process's packages and the clone's code."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    environment = f'export PYTHONPATH="{folder}"\n'
    (programs / "qformer").write_text(f'#!/bin/sh\n{environment}exec {sys.executable} -m jobs.cli "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\n{environment}exec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (programs / "activate").write_text(f'export PATH="{programs}:$PATH"\n')
    (folder / ".venv" / ".installed").touch()


def write_photographs(folder, table):
    """Forty photographs, captions beside them, one of them beach.jpg."""
    folder.mkdir()
    for number, line in enumerate(table.read_text().splitlines()[:40]):
        row = json.loads(line)
        name = "beach" if number == 0 else f"photo{number}"
        shutil.copy(table.parent / row["image"], folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in row["captions"]))


@pytest.fixture(scope="module")
def port():
    """A free port in the place of 8000, which other tests may use at the same time."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def six(clone, port):
    """The output of the six commands; afterwards the server still answers."""
    *before, serve, ask = SIX.text.replace("\\\n", "").strip().splitlines()
    assert len(before) == 4 and serve.startswith("qformer serve ") and ask.startswith("curl ")
    first = shell("\n".join(before), clone)
    assert first.returncode == 0, first.stdout + first.stderr
    server = subprocess.Popen(
        ["bash", "-c", f". .venv/bin/activate && exec {serve} --set port={port}"],
        cwd=clone,
        start_new_session=True,
        env=environment(),
    )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/readyz")
        yield first.stdout + first.stderr, shell(at(port, ask), clone)
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
        assert server.wait(120) is not None


def at(port, text):
    assert ":8000/" in text
    return text.replace(":8000/", f":{port}/")


def environment():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def shell(script, folder):
    script = f"set -e\n{script}\n"
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment(), capture_output=True, text=True)


def wait_until_ready(server, url, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "the server has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=15) as answer:
            assert answer.status == 200
            return
        time.sleep(1)
    pytest.fail(f"no answer from {url} in {seconds} s")


def test_the_six_commands_end_with_a_served_caption(six):
    printed, answer = six
    assert "rows in 40 = rows used 40 + rows quarantined 0" in printed
    assert answer.returncode == 0 and '"caption"' in answer.stdout, answer.stdout + answer.stderr


def test_a_client_of_openai_asks_as_the_serving_page_shows(six, clone, port):
    shutil.copy(clone / "photos" / "beach.jpg", clone / "photo.jpg")
    (clone / "client.py").write_text(at(port, CLIENT.text))
    asked = shell(". .venv/bin/activate\npython client.py", clone)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize("job", ["doctor", "evaluate"])
def test_a_run_is_looked_at_as_the_evaluation_page_shows(six, clone, job):
    commands = [words for block in blocks_in("sh") for words in block.commands if words[:2] == ["qformer", job]]
    words = next(words for words in commands if "runs/stage1" in " ".join(words))
    # The photographs have no split for evaluation.
    more = ["--set", "data.split=train"] if job == "evaluate" else []
    command = " ".join([*words, *more])
    looked = shell(f". .venv/bin/activate\n{command} || test $? = 1", clone)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    written = "runs/stage1/doctor.json" if job == "doctor" else "runs/retrieval/retrieval.json"
    assert (clone / written).is_file(), looked.stdout + looked.stderr


def test_training_from_python_runs_as_the_api_page_shows(six, clone):
    (clone / "train.py").write_text(TRAINING.text)
    trained = shell(". .venv/bin/activate\npython train.py", clone)
    assert trained.returncode == 0 and "quarantined 0" in trained.stdout, trained.stderr
    assert (clone / "runs" / "from-python" / "summary.json").is_file()


def test_recipes_train_at_toy_size_as_their_page_shows(ray_local, tmp_path, monkeypatch):
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    monkeypatch.chdir(tmp_path)
    first, *trainings = RECIPES.commands
    assert first == ["python", "-m", "jobs.demo.toy"] and len(trainings) >= 3
    toy.main([])
    for words in trainings:
        assert cli.main(words[1:]) == 0
        output = re.search(r"output=(\S+)", " ".join(words))[1]
        assert yaml.safe_load((tmp_path / output / "settings.yaml").read_text())["steps"] == 4
