"""Folders of a store, fetched for as long as they are wanted."""

import os
import subprocess
import sys
from pathlib import Path

from pipelines.data import storage
from pipelines.data.storage.local_copies import local_folder, remove_copy


def test_a_local_folder_is_itself_and_stays(tmp_path):
    (tmp_path / "a").write_text("1")
    assert local_folder(str(tmp_path)) == tmp_path
    remove_copy(str(tmp_path), tmp_path)
    assert (tmp_path / "a").read_text() == "1"


def test_a_copy_of_a_store_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uri = f"memory://{tmp_path.name}/run"
    storage.write_text(f"{uri}/checkpoints/a", "1")
    folder = local_folder(f"{uri}/checkpoints")
    assert (folder / "a").read_text() == "1" and list(tmp_path.iterdir()) == [folder]
    remove_copy(uri, folder)
    assert list(tmp_path.iterdir()) == []
    assert storage.read_bytes(f"{uri}/checkpoints/a", 10) == b"1"


def test_a_copy_goes_with_its_process(tmp_path):
    code = (
        "from pipelines.data import storage; from pipelines.data.storage.local_copies import local_folder\n"
        "storage.write_text('memory://run/a', '1'); print((local_folder('memory://run') / 'a').read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[4],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n", done.stderr
    assert list(tmp_path.iterdir()) == []
