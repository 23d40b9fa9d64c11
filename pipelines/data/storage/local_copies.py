"""Folders as paths of this machine: where they lie, or fetched into a temporary folder."""

import atexit
import shutil
import tempfile
from pathlib import Path

from pipelines.data import storage


def local_folder(uri: str) -> Path:
    """Return a folder's local path. One of a store is fetched; the copy goes with this process, or by `remove_copy`."""
    if storage.is_local(uri):
        return Path(storage.local_path(uri))
    target = tempfile.mkdtemp(prefix="qformer-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    storage.fetch_folder(uri, target)
    return Path(target)


def remove_copy(uri: str, folder: Path) -> None:
    """Remove what `local_folder` fetched; a folder that lies on this machine by itself stays.

    Args:
        uri: Of the folder, or of one that holds it.
        folder: As `local_folder` returned it.
    """
    if not storage.is_local(uri):
        shutil.rmtree(folder, ignore_errors=True)
