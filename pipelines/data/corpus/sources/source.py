"""Read any source as blocks of manifest rows and failures of single rows."""

import contextlib
import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.data import schema, storage
from pipelines.data.corpus.name_set import NameSet
from pipelines.data.corpus.sources import annotations, delimited, folders, jsonl, parquet, webdataset, webvid
from pipelines.data.corpus.sources.detect import FORMATS, format_of
from pipelines.data.corpus.sources.files import is_source_folder, source_exists
from pipelines.data.corpus.sources.raw import BadRow, BadRowError, RawRow, Source
from pipelines.data.corpus.sources.rows import Row, RowBuilder
from pipelines.data.failures import Failure, MediaError
from pipelines.data.names import suggest
from qformer.errors import UserError

_BLOCK_ROWS = 1024
_BLOCK_BYTES = 64 * 1024**2
"""Limit for the bytes of files inside the rows of a block."""
_SCHEMA_ROWS = 1000
"""Number of first rows that decide which columns a table has."""
_TABLES = ("parquet", "jsonl", "csv")
_COLUMNS = (*schema.MANIFEST_SCHEMA.names, *schema.SINGULAR)


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """Some consecutive rows of a source."""

    rows: pa.Table
    """Rows in `schema.MANIFEST_SCHEMA`."""
    failures: list[Failure]
    """Rows that cannot become manifest rows; their sample ids are source and row number."""


def read_source(source: Source, used_ids: NameSet | None = None) -> Iterator[SourceBlock]:
    """Read a source block by block.

    Rows without a sample id get their media path as one. If that id is used already, #NUMBER of the row is appended;
    if that is used, too, the source's name is prepended.

    Args:
        source: Source to read.
        used_ids: Sample ids of earlier sources, to which this source's are added; repeated ids are failures.

    Yields:
        Blocks of at most 1,024 rows.

    Raises:
        UserError: If the source cannot be read as a whole. Wrong single rows raise nothing.
    """
    check_source(source)
    used_ids = used_ids if used_ids is not None else NameSet()
    with _user_errors(source):
        root = source.media_root or _own_folder(source)
    builder = RowBuilder(media_root=root, kind=source.kind, split=source.split, source=source.name)
    rows: list[tuple[RawRow, Row, str | None]] = []
    failures: list[Failure] = []
    num_bytes = 0
    for raw in _raw_rows(source):
        if isinstance(raw, BadRow):
            failures.append(_failure(source, raw, raw.error_class, raw.message, raw.media))
            continue
        try:
            with _user_errors(source):
                row, name = builder.build(raw)
        except BadRowError as error:
            failures.append(_failure(source, raw, error.error_class, error.message, raw.values.get(schema.MEDIA)))
            continue
        rows.append((raw, row, name))
        num_bytes += len(row[schema.MEDIA_BYTES] or b"")
        if len(rows) == _BLOCK_ROWS or num_bytes > _BLOCK_BYTES:
            yield _block(source, rows, failures, used_ids)
            rows, failures, num_bytes = [], [], 0
    if rows or failures:
        yield _block(source, rows, failures, used_ids)


def check_source(source: Source) -> None:
    """Check a source before any row of it is read.

    Raises:
        UserError: If it does not exist, its format is unknown, or `columns` names an unknown column.
    """
    if source.format not in ("auto", *FORMATS):
        raise UserError(f"format {source.format!r} of {source.path} is unknown{suggest(source.format, FORMATS)}")
    for name in source.columns:
        if name not in _COLUMNS:
            raise UserError(
                f"source {source.path}: columns maps {name!r}, which is not a manifest column{suggest(name, _COLUMNS)}"
            )
    with _user_errors(source):
        is_pattern = "{" in source.path and source.format in ("auto", "webdataset")
        if not is_pattern and not source_exists(source.path):
            raise UserError(f"source {source.path} does not exist; check the path")


def _own_folder(source: Source) -> str:
    is_folder = source.format == "folder" or is_source_folder(source.path)
    return source.path if is_folder else storage.parent(source.path)


def _raw_rows(source: Source) -> Iterator[RawRow | BadRow]:
    """Yield all rows under the manifest's column names."""
    with _user_errors(source):
        format_name = source.format if source.format != "auto" else format_of(source.path)
        reader = _reader(source, format_name)
        yield from _renamed(reader, source) if format_name in _TABLES else reader


@contextlib.contextmanager
def _user_errors(source: Source) -> Iterator[None]:
    """Turn the errors that stop the reading of a source into UserErrors."""
    try:
        yield
    except (UserError, BadRowError):
        raise
    except MediaError as error:
        # A "config" message says what to change; the others failed in all tries.
        raise UserError(
            f"cannot read source {source.path}: {error.message.removeprefix(f'{source.path}: ')}"
        ) from error
    except Exception as error:
        # Remote file systems raise their own types; on local disks any other error is a bug.
        if storage.is_local(source.path) and not isinstance(error, OSError | UnicodeError | csv.Error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read source {source.path}: {type(error).__name__}: {reason}; check path, credentials and endpoint"
        ) from error


def _reader(source: Source, format_name: str) -> Iterator[RawRow | BadRow]:
    path = source.path
    match format_name:
        case "parquet":
            return parquet.read_parquet(path)
        case "jsonl":
            return jsonl.read_jsonl(path)
        case "csv":
            return delimited.read_csv(path)
        case "webdataset":
            return webdataset.read_webdataset(path, dict(source.columns))
        case "folder":
            if not is_source_folder(path):
                raise UserError(f"source {path} is a file; format=folder needs a folder")
            return folders.read_folder(path)
    if source.columns:
        raise UserError(f"source {path}: format {format_name} has fixed names, so columns has no effect; remove it")
    if format_name == "webvid":
        return webvid.read_webvid(path)
    return annotations.read_annotations(path, "auto" if format_name == "annotations" else format_name)


def _renamed(rows: Iterator[RawRow | BadRow], source: Source) -> Iterator[RawRow | BadRow]:
    """Rename the columns of a table's rows; the first rows show whether the columns exist."""
    first = list(itertools.islice(rows, _SCHEMA_ROWS))
    found = dict.fromkeys(name for row in first if isinstance(row, RawRow) for name in row.values)
    names = {ours: source.columns.get(ours, ours) for ours in _COLUMNS}
    for ours in source.columns:
        if found and names[ours] not in found:
            raise UserError(f"{source.path} has no column {names[ours]!r}{suggest(names[ours], found)}")
    if found and names[schema.MEDIA] not in found and names[schema.MEDIA_BYTES] not in found:
        raise UserError(
            f"{source.path} has no column {schema.MEDIA!r} (or {schema.MEDIA_BYTES!r}) but {', '.join(sorted(found))}; "
            f"name it with columns: {{{schema.MEDIA}: ITS_NAME}}"
        )
    for row in itertools.chain(first, rows):
        yield row if isinstance(row, BadRow) else RawRow(row.number, row.place, _ours(row.values, names))


def _ours(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    for one, several in schema.SINGULAR.items():
        if one in renamed:
            renamed.setdefault(several, renamed.pop(one))
    return renamed


def _block(
    source: Source, rows: list[tuple[RawRow, Row, str | None]], failures: list[Failure], used_ids: NameSet
) -> SourceBlock:
    """Give every row a unique id; rows whose own id is used already fail."""
    ids = [row[schema.SAMPLE_ID] or name or f"row-{raw.number}" for raw, row, name in rows]
    is_new = used_ids.add(ids)
    unique_rows: list[Row] = []
    for (raw, row, _), sample_id, is_first in zip(rows, ids, is_new.tolist(), strict=True):
        if not is_first and row[schema.SAMPLE_ID] is None:
            numbered = (f"{sample_id}#{raw.number}", f"{source.name}/{sample_id}#{raw.number}")
            sample_id = next((name for name in numbered if used_ids.add([name])[0]), sample_id)
            is_first = sample_id in numbered
        if is_first:
            unique_rows.append({**row, schema.SAMPLE_ID: sample_id})
        else:
            message = f"sample_id {sample_id!r} was used by an earlier row"
            failures.append(_failure(source, raw, "config", message, row[schema.MEDIA]))
    columns = {name: [row[name] for row in unique_rows] for name in schema.MANIFEST_SCHEMA.names}
    return SourceBlock(pa.table(columns, schema=schema.MANIFEST_SCHEMA), failures)


def _failure(source: Source, raw: RawRow | BadRow, error_class: str, message: str, media: Any) -> Failure:
    name = source.name or source.path.rstrip("/").rpartition("/")[2]
    shown = media.encode("utf-8", "backslashreplace").decode() if isinstance(media, str) else None
    text = " ".join(f"{raw.place}: {message}".split()).encode("utf-8", "backslashreplace").decode()
    return Failure(f"{name}:{raw.number}", shown, "manifest", error_class, text[:400])
