"""Parquet tables, one file or a folder of part files."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import storage
from pipelines.data.corpus.manifest_files import manifest_files
from pipelines.data.corpus.sources.files import is_source_folder, list_source, open_source
from pipelines.data.corpus.sources.raw import RawRow
from pipelines.data.corpus.sources.text import decode_text
from pipelines.data.storage.retries import with_retries
from qformer.errors import UserError

_BATCH_ROWS = 256
"""Rows of a batch; small, because rows may contain whole files."""
EXTENSIONS = (".parquet", ".pq")


def read_parquet(path: str) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, or of all Parquet files of a folder by name.

    Raises:
        UserError: If a file is not Parquet.
        MediaError: If it cannot be read.
    """
    number = 0
    for part in part_files(path):
        for batch in _batches(part):
            for values in rows_of(batch):
                number += 1
                yield RawRow(number, f"{part}, row {number}", values)


def part_files(path: str) -> list[str]:
    """The Parquet files of a source, without names that begin with "_" or ".", which other programs write."""
    if not is_source_folder(path):
        return [path]
    if written := with_retries(path, lambda: manifest_files(path)):
        return written  # without the quarantine table in the same folder
    names = [name for name in list_source(path) if name.lower().endswith(EXTENSIONS)]
    parts = [name for name in names if not name.rpartition("/")[2].startswith(("_", "."))]
    if not parts:
        raise UserError(f"folder {path} holds no Parquet files; check the path or set format")
    return [storage.join(path, name) for name in parts]


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as dicts; text that is not UTF-8 is marked for `text.require_unicode`."""
    columns = [_values(column) for column in batch.columns]
    for cells in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, cells, strict=True))


def _batches(path: str) -> Iterator[pa.RecordBatch]:
    try:
        with open_source(path) as file:
            yield from pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {path} as parquet: {reason}; check the file or set format") from error


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        # Arrow does not validate text when it reads; only these columns need the slow conversion.
        return [_decode_values(value) for value in column.cast(_as_binary(column.type)).to_pylist()]


def _as_binary(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_as_binary(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_binary(kind.value_type))
    return kind


def _decode_values(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode_values(item) for item in value]
    return decode_text(value) if isinstance(value, bytes) else value
