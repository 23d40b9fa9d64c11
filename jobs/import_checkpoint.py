"""A LAVIS file or a Hugging Face folder becomes a checkpoint that every other job takes."""

import json
import sys
from pathlib import Path

from jobs.cli import run_job
from jobs.settings import ImportSettings
from pipelines.data import storage
from qformer.bridge import FORMAT_VERSION
from qformer.conversion.bundle import ImportOptions, write_bundle
from qformer.conversion.huggingface import import_huggingface
from qformer.conversion.lavis import import_lavis
from qformer.errors import UserError


def main(settings: ImportSettings) -> None:
    """Convert, write and print what became of every tensor.

    Raises:
        UserError: If the output is in use, or the source cannot be imported as the settings ask.
    """
    source, output = Path(settings.source), local_output(settings.output)
    if not source.exists():
        raise UserError(f"source={settings.source} does not exist; give a local LAVIS file or Hugging Face folder")
    options = ImportOptions(**settings.model_dump(exclude={"source", "output"}))
    convert = import_huggingface if source.is_dir() else import_lavis
    bundle = convert(source, output, options)
    write_bundle(output, bundle)
    # Written last: a folder without it is no finished checkpoint.
    marker = {"format_version": FORMAT_VERSION, "step": bundle.info.step}
    storage.write_text(storage.join(str(output), storage.COMPLETE_MARKER), json.dumps(marker, indent=2) + "\n")
    print(f"{source} -> {output}: stage {bundle.info.stage}\n{bundle.report}")


def local_output(output: str) -> Path:
    """The folder to write.

    Raises:
        UserError: If it is not local, or holds anything.
    """
    if not storage.is_local(output):
        raise UserError(f"output={output} is not local; write to a local folder and copy it there")
    storage.require_unused(output, "output")
    return Path(storage.local_path(output))


if __name__ == "__main__":
    sys.exit(run_job("import"))
