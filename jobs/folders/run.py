"""The folder of a training run: claimed at the start, emptied again if a user error ends a new run early."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from jobs.cluster.exceptions import find_user_error
from jobs.folders.output import SETTINGS_FILE, require_unused
from jobs.settings.loading import load_saved, resolved_yaml
from jobs.settings.train import TrainSettings
from pipelines.data import storage
from pipelines.data.corpus.quarantine import QUARANTINE_FILE
from pipelines.data.storage import checkpoint_folders
from pipelines.data.storage.local_copies import remove_copy
from qformer.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_folder(settings: TrainSettings) -> Iterator[None]:
    """Claim `settings.output` and write settings.yaml into it.

    If a user error ends a new run before it has a checkpoint or a quarantine table, the content of a local folder is
    removed, so that the corrected command can use it.

    Raises:
        UserError: If the folder holds anything else.
    """
    is_new = not storage.exists(settings.output) or not storage.list_files(settings.output)
    if settings.resume:
        _require_same_run(settings)
    else:
        require_unused(settings.output, "output")
    storage.write_text(storage.join(settings.output, SETTINGS_FILE), resolved_yaml(settings))
    try:
        yield
    except Exception as error:
        results = (checkpoint_folders.CHECKPOINTS_FOLDER, QUARANTINE_FILE)
        has_results = any(storage.exists(storage.join(settings.output, name)) for name in results)
        if is_new and storage.is_local(settings.output) and find_user_error(error) and not has_results:
            _empty(Path(storage.local_path(settings.output)))
        raise


def _require_same_run(settings: TrainSettings) -> None:
    output = settings.output
    if not storage.exists(output):
        raise UserError(f"resume: {output} does not exist; start the run without --resume")
    if storage.list_files(output):
        stage = _stage_of(output)
        if stage is None:
            raise UserError(f"resume: {output} is used, but by no training run; choose the run's own folder as output")
        if stage != settings.stage:
            raise UserError(f"resume: the run in {output} is of stage {stage}, the settings say stage={settings.stage}")
    found = checkpoint_folders.newest_whole_checkpoint(output)
    logger.info("resuming from %s", found.name if found else "the start: no checkpoint yet")
    if found:
        remove_copy(output, found)  # each worker finds the checkpoint itself


def _stage_of(output: str) -> int | None:
    """Stage of the run in a folder; None if there is no run."""
    path = storage.join(output, SETTINGS_FILE)
    if not storage.exists(path):
        return None
    try:
        with storage.open_input(path) as file:
            saved = load_saved(TrainSettings, file.read().decode())
    except UnicodeDecodeError:
        return None
    return None if saved is None else saved.stage


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
