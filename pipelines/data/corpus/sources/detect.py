"""The format of a source, by its name and content."""

from pipelines.data.corpus.sources import parquet
from pipelines.data.corpus.sources.delimited import header
from pipelines.data.corpus.sources.files import is_source_folder, list_source
from pipelines.data.corpus.sources.webvid import is_webvid
from pipelines.data.media.kinds import kind_of_name
from qformer.errors import UserError

FORMATS = ("parquet", "jsonl", "csv", "folder", "coco", "karpathy", "lavis", "webvid", "webdataset")

_FORMAT_OF_EXTENSION = {
    **dict.fromkeys(parquet.EXTENSIONS, "parquet"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".json": "annotations",
    ".tar": "webdataset",
}
_PACKED_EXTENSIONS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


def format_of(path: str) -> str:
    """One of `FORMATS`, or "annotations" for a JSON document, whose format is detected when it is read.

    Raises:
        UserError: If the name does not show the format.
        MediaError: If a table cannot be read.
    """
    if is_source_folder(path):
        return _format_of_folder(path)
    lower = path.lower()
    if lower.endswith(_PACKED_EXTENSIONS):
        raise UserError(f"{path} is compressed, and its members cannot be read by position; unpack it to .tar first")
    for extension, name in _FORMAT_OF_EXTENSION.items():
        if lower.endswith(extension):
            return "webvid" if name == "csv" and is_webvid(header(path)) else name
    raise UserError(f"cannot tell the format of {path} by its name; set format to one of {', '.join(FORMATS)}")


def _format_of_folder(path: str) -> str:
    names = [name for name in list_source(path) if not name.rpartition("/")[2].startswith(("_", "."))]
    lower = [name.lower() for name in names]
    if any(name.endswith((".tar", *_PACKED_EXTENSIONS)) for name in lower):
        return "webdataset"
    has_media = any(kind_of_name(name) for name in lower)
    has_tables = any(name.endswith(parquet.EXTENSIONS) for name in lower)
    return "parquet" if has_tables and not has_media else "folder"
