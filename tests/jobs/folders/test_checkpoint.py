"""What jobs tell of a checkpoint: one clear line where it is damaged, and what of an instruction it does not read."""

import json
import shutil

import pytest
from PIL import Image

from jobs.cli import main as cli
from tests.tiny_checkpoints import write_stage2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_stage2(tmp_path_factory.mktemp("checkpoint") / "whole")
    Image.new("RGB", (80, 60), "red").save(folder.parent / "red.png")
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "damaged")


def assert_one_line(job, checkpoint, whole, capsys, *mentioned):
    words = {
        "caption": [str(whole.parent / "red.png")],
        "evaluate": ["--set", "data.manifest=nowhere.parquet", "--set", f"output={checkpoint.parent / 'out'}"],
        "serve": ["--set", "port=1"],
        "export": ["--set", f"output={checkpoint.parent / 'out'}"],
    }[job]
    capsys.readouterr()
    assert cli.main([job, "--set", f"checkpoint={checkpoint}", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    told = [line for line in error if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in "".join(error)
    for part in mentioned:
        assert part in told[0]


@pytest.mark.parametrize("words", [3, 40])
def test_caption_tells_that_it_cut_the_instruction(whole, capsys, caplog, words):
    picture, instruction = str(whole.parent / "red.png"), "a " * words
    assert cli.main(["caption", "--set", f"checkpoint={whole}", "--set", f"instruction={instruction}", picture]) == 0
    assert ("instruction: cut to max_text_tokens=16, as in training" in caplog.text) == (words == 40)


def changed(content, **values):
    return json.dumps({**json.loads(content), **values}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff\xfe\x00\x80" + content,  # no text
        lambda content: b"[1, 2]",
        lambda content: b'{"format_version": 1}',
        lambda content: changed(content, unknown=1),
        lambda content: changed(content, vision=None),
        lambda content: changed(content, language=None),
        lambda content: changed(content, qformer={**json.loads(content)["qformer"], "num_heads": 0}),
        lambda content: changed(content, preprocessing={}),
    ],
    ids=["cut", "empty", "binary", "list", "bare", "unknown", "vision", "language", "heads", "preprocessing"],
)
def test_a_damaged_bridge_json_is_named(checkpoint, whole, capsys, damage):
    file = checkpoint / "bridge.json"
    file.write_bytes(damage(file.read_bytes()))
    assert_one_line("export", checkpoint, whole, capsys, str(file), "is damaged", "use an earlier checkpoint")


@pytest.mark.parametrize("job", ["caption", "evaluate", "serve"])
def test_every_job_names_it(checkpoint, whole, capsys, job):
    (checkpoint / "bridge.json").write_bytes(b'{"format_')
    assert_one_line(job, checkpoint, whole, capsys, str(checkpoint / "bridge.json"), "is damaged")


@pytest.mark.parametrize("job", ["caption", "evaluate", "serve", "export"])
def test_a_missing_bridge_json_is_named(checkpoint, whole, capsys, job):
    (checkpoint / "bridge.json").unlink()
    assert_one_line(job, checkpoint, whole, capsys, str(checkpoint / "bridge.json"), "missing")


@pytest.mark.parametrize("job", ["caption", "export"])
@pytest.mark.parametrize("kept", [0, 5, 1000, None])
def test_damaged_or_missing_weights_are_named(checkpoint, whole, capsys, job, kept):
    file = checkpoint / "bridge.safetensors"
    content = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(content[:kept])
    assert_one_line(job, checkpoint, whole, capsys, str(file), "missing or damaged", "copy it there again")
