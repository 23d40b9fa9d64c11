import pytest

from pipelines.data import storage
from pipelines.data.storage import checkpoint_folders
from pipelines.data.storage.local_copies import local_folder
from qformer.errors import UserError


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_the_newest_finished_checkpoint(tmp_path, scheme):
    root = str(tmp_path) if scheme == "local" else f"memory://{tmp_path.name}-{scheme}"
    for step, is_complete in [(20, True), (100, True), (200, False)]:
        folder = storage.join(root, "checkpoints", f"step-{step:08d}")
        storage.write_text(storage.join(folder, "bridge.json"), "{}")
        if is_complete:
            storage.write_text(storage.join(folder, "complete.json"), "{}")
    newest = checkpoint_folders.newest_checkpoint(root)
    assert newest.endswith("checkpoints/step-00000100")
    assert checkpoint_folders.newest_checkpoint(newest) == newest
    copy = local_folder(newest)
    assert sorted(path.name for path in copy.iterdir()) == ["bridge.json", "complete.json"]


def test_no_checkpoint_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint_folders.newest_checkpoint(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint_folders.newest_checkpoint(str(tmp_path))


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_reads_are_limited(tmp_path, scheme):
    uri = str(tmp_path / "a") if scheme == "local" else f"memory://{tmp_path.name}/a"
    storage.write_bytes(uri, b"12345")
    assert storage.read_bytes(uri, 5) == b"12345"
    with pytest.raises(storage.FileTooLargeError):
        storage.read_bytes(uri, 4)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    storage.write_text(str(path), "old")
    with pytest.raises(TypeError):
        storage.write_bytes(str(path), None)  # type: ignore[arg-type]
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["a"]
