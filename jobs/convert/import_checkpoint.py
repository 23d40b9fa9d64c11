"""Convert a LAVIS file or a Hugging Face folder to a checkpoint for all other jobs."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs.folders.output import require_unused
from jobs.settings.convert import ImportSettings
from pipelines.data import storage
from pipelines.data.storage import checkpoint_folders
from qformer.conversion.bundle import ImportOptions
from qformer.conversion.checkpoint import FORMAT_VERSION
from qformer.conversion.huggingface import import_huggingface
from qformer.conversion.lavis import import_lavis
from qformer.errors import UserError


def main(settings: ImportSettings) -> None:
    """Convert, write and print a report on every tensor.

    Raises:
        UserError: If the output is in use, or the source cannot be imported with these settings.
    """
    source, output = Path(settings.source), local_output(settings.output)
    if not source.exists():
        raise UserError(f"source={settings.source} does not exist; give a local LAVIS file or Hugging Face folder")
    options = ImportOptions(**{one.name: getattr(settings, one.name) for one in dataclasses.fields(ImportOptions)})
    convert = import_huggingface if source.is_dir() else import_lavis
    with atomic_folder(output) as folder:
        bundle = convert(source, folder, options)
        bundle.save(folder)
        marker = {"format_version": FORMAT_VERSION, "step": bundle.info.step}
        checkpoint_folders.write_marker(folder, marker)
    print("\n".join([f"{source} -> {output}: stage {bundle.info.stage}", *bundle.report.lines()]))


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `output` at the end and is removed on an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private to the user
        folder.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def local_output(output: str) -> Path:
    """Resolve the output folder.

    Raises:
        UserError: If it is not local, or holds anything.
    """
    if not storage.is_local(output):
        raise UserError(f"output={output} is not local; write to a local folder and copy it there")
    require_unused(output, "output")
    return Path(storage.local_path(output))
