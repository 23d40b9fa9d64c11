"""Checkpoint folders of a run: which are finished, intact, or old enough to remove.

RUN/checkpoints/step-00000500/complete.json is written last: a folder without it is an unfinished copy. It holds the
size and SHA-256 of every other file.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipelines.data import storage
from pipelines.data.storage.local_copies import local_folder, remove_copy
from qformer.errors import UserError

CHECKPOINTS_FOLDER, COMPLETE_MARKER = "checkpoints", "complete.json"
_NAME = re.compile(r"step-(\d{8})")
_CHUNK_BYTES = 2**22

logger = logging.getLogger(__name__)


def checkpoint_uri(run: str, step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return storage.join(run, CHECKPOINTS_FOLDER, f"step-{step:08d}")


def finished_checkpoints(run: str) -> list[str]:
    """Folders of the finished checkpoints of a run, newest first."""
    folder = storage.join(run, CHECKPOINTS_FOLDER)
    names = sorted(filter(_NAME.fullmatch, storage.folder_names(folder)), reverse=True)
    return [uri for uri in (storage.join(folder, name) for name in names) if _is_finished(uri)]


def newest_checkpoint(run_or_checkpoint: str) -> str:
    """Find the newest finished checkpoint.

    Args:
        run_or_checkpoint: A run folder (with `checkpoints/step-XXXXXXXX`), or a checkpoint folder itself.

    Raises:
        UserError: If there is none.
    """
    if _is_finished(run_or_checkpoint):
        return run_or_checkpoint
    found = finished_checkpoints(run_or_checkpoint)
    if found:
        return found[0]
    what = "holds no finished checkpoint" if storage.exists(run_or_checkpoint) else "does not exist"
    raise UserError(
        f"{run_or_checkpoint} {what}; give a run folder with {CHECKPOINTS_FOLDER}/step-*/{COMPLETE_MARKER}, "
        "or such a checkpoint folder"
    )


def whole_checkpoint(run_or_checkpoint: str) -> Path:
    """`newest_checkpoint` as a local folder with verified files.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    uri = newest_checkpoint(run_or_checkpoint)
    folder = local_folder(uri)
    if (problem := damage(folder)) is not None:
        raise UserError(f"checkpoint {uri} is damaged ({problem}); name an earlier one")
    return folder


def newest_whole_checkpoint(run: str, warn: Callable[[str], object] = logger.warning) -> Path | None:
    """The newest checkpoint with verified files, local or fetched; None before the first.

    Args:
        run: Run folder.
        warn: Receiver of one message for each newer checkpoint that is damaged.

    Raises:
        UserError: If there are checkpoints, and all are damaged.
    """
    finished = finished_checkpoints(run)
    for uri in finished:
        folder = local_folder(uri)
        problem = damage(folder)
        if problem is None:
            return folder
        remove_copy(uri, folder)
        warn(f"checkpoint {uri} is damaged ({problem}); the one before is used")
    if finished:
        raise UserError(f"every checkpoint of {run} is damaged; start a new run in another output")
    return None


def write_marker(folder: Path, values: dict[str, Any]) -> None:
    """Finish a checkpoint folder: write `values` and the size and hash of every file."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / COMPLETE_MARKER).write_text(json.dumps({**values, "files": files}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """Describe the damage of a finished local checkpoint; None when it is intact."""
    try:
        files = json.loads((folder / COMPLETE_MARKER).read_text())["files"]
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has other content than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE_MARKER}: {type(error).__name__} {error}"
    return None


def prune(run: str, keep: int, always: Collection[int] = ()) -> list[str]:
    """Remove all but the newest finished checkpoints.

    Args:
        run: Run folder.
        keep: Number of the newest checkpoints to keep.
        always: Steps whose checkpoints are kept in addition.

    Returns:
        The removed folders.
    """
    removed = []
    for uri in finished_checkpoints(run)[keep:]:
        if step_of(uri) not in always:
            # The marker goes first, so that an interrupted removal leaves nothing that looks finished.
            storage.remove_file(storage.join(uri, COMPLETE_MARKER))
            storage.remove_folder(uri)
            removed.append(uri)
    return removed


def step_of(checkpoint: str) -> int:
    """Optimizer steps before a checkpoint."""
    return int(checkpoint.rstrip("/")[-8:])


def _is_finished(uri: str) -> bool:
    return storage.exists(storage.join(uri, COMPLETE_MARKER))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
