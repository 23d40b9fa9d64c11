"""Find a checkpoint and read its description, without loading a model."""

from pipelines.data import storage
from pipelines.data.storage import checkpoint_folders
from pipelines.data.storage.local_copies import local_folder, remove_copy
from qformer.conversion.checkpoint import INFO_FILE, BridgeInfo
from qformer.errors import UserError

_MAX_INFO_BYTES = 2**20


def open_checkpoint(run_or_checkpoint: str) -> tuple[str, BridgeInfo]:
    """Resolve a setting to a checkpoint folder.

    Args:
        run_or_checkpoint: Path or URI of a run folder, of which the newest finished checkpoint is taken, or of a
            checkpoint folder.

    Returns:
        The checkpoint's folder and its bridge.json.

    Raises:
        UserError: If there is no checkpoint, or it is damaged or has another format.
    """
    folder = checkpoint_folders.newest_checkpoint(run_or_checkpoint)
    file = storage.join(folder, INFO_FILE)
    try:
        content = storage.read_bytes(file, _MAX_INFO_BYTES)
    except OSError as error:
        raise UserError(f"{file!r} is damaged or missing ({error}); use an earlier checkpoint") from error
    return folder, BridgeInfo.from_json(content, file)


def require_whole(folder: str) -> None:
    """Check that the files of a checkpoint are undamaged.

    Raises:
        UserError: If a file is damaged or cannot be read.
    """
    try:
        path = local_folder(folder)
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be read ({error}); try again, or name another") from error
    problem = checkpoint_folders.damage(path)
    remove_copy(folder, path)
    if problem is not None:
        raise UserError(f"checkpoint {folder} is damaged ({problem}); name an earlier one")


def checkpoint_name(folder: str) -> str:
    """Name of a checkpoint without its path: "RUN/step-00000400", or the name of the folder."""
    parts = [part for part in folder.rstrip("/").split("/") if part]
    if len(parts) >= 3 and parts[-2] == checkpoint_folders.CHECKPOINTS_FOLDER:
        return f"{parts[-3]}/{parts[-1]}"
    return parts[-1]
