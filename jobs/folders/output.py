"""Output folders: the check that they are unused, and the names of the files that jobs write into them."""

import os

from pipelines.data import storage
from qformer.errors import UserError

SETTINGS_FILE, SUMMARY_FILE = "settings.yaml", "summary.json"
"""Files of a job's output folder: its resolved settings, and its result."""


def require_unused(folder: str, setting: str) -> None:
    """Check that an output folder is absent or empty.

    Args:
        folder: Path or URI of the folder.
        setting: Name of the setting that holds it, for the message.

    Raises:
        UserError: If the folder holds anything, or is a file.
    """
    if not storage.exists(folder):
        return
    if not storage.is_folder(folder):
        raise UserError(f"{setting}={folder} is a file; give a new folder")
    found = os.listdir(storage.local_path(folder)) if storage.is_local(folder) else storage.list_files(folder)
    if found:
        raise UserError(
            f"{setting}={folder} is already used (it holds {sorted(found)[0]}); "
            "choose another folder, or delete this one"
        )
