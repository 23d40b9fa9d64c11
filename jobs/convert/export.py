"""Convert a checkpoint to a Hugging Face folder that stock transformers loads and runs."""

from jobs.convert.import_checkpoint import atomic_folder, local_output
from jobs.folders.checkpoint import open_checkpoint
from jobs.settings.convert import ExportSettings
from pipelines.data.storage.local_copies import local_folder
from qformer.conversion.huggingface import export_huggingface


def main(settings: ExportSettings) -> None:
    """Convert, write and print a report on every tensor.

    Raises:
        UserError: If the output is in use, or Hugging Face's layout cannot hold the checkpoint.
    """
    output = local_output(settings.output)
    folder, _ = open_checkpoint(settings.checkpoint)
    with atomic_folder(output) as unfinished:
        report = export_huggingface(local_folder(folder), unfinished)
    print("\n".join([f"{folder} -> {output}", *report.lines()]))
