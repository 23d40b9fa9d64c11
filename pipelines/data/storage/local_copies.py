"""Local paths of folders; remote ones are copied into a temporary folder."""

import atexit
import shutil
import tempfile
from pathlib import Path

from pipelines.data import storage


def local_folder(uri: str) -> Path:
    """Return a folder's local path; a remote folder is copied until this process ends or `remove_copy` is called."""
    if storage.is_local(uri):
        return Path(storage.local_path(uri))
    target = tempfile.mkdtemp(prefix="qformer-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    storage.fetch_folder(uri, target)
    return Path(target)


def remove_copy(uri: str, folder: Path) -> None:
    """Remove a copy that `local_folder` made; a folder that is local itself stays.

    Args:
        uri: URI of the folder, or of one that contains it.
        folder: Path that `local_folder` returned.
    """
    if not storage.is_local(uri):
        shutil.rmtree(folder, ignore_errors=True)
