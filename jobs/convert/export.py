"""A checkpoint becomes a Hugging Face folder that stock transformers loads and runs."""

from jobs.convert.import_checkpoint import local_output, written_aside
from jobs.folders.checkpoint import open_checkpoint
from jobs.settings.jobs import ExportSettings
from pipelines.data.storage.local_copies import local_folder
from qformer.conversion.huggingface import export_huggingface


def main(settings: ExportSettings) -> None:
    """Convert, write and print what became of every tensor.

    Raises:
        UserError: If the output is in use, or the checkpoint does not fit Hugging Face's layout.
    """
    output = local_output(settings.output)
    folder, _ = open_checkpoint(settings.checkpoint)
    with written_aside(output) as aside:
        report = export_huggingface(local_folder(folder), aside)
    print("\n".join([f"{folder} -> {output}", *report.lines()]))
