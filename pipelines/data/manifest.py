"""Manifests: tables and folders of media files, read into one form."""

import difflib
import io
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data import schema, storage
from pipelines.data.media import SNIFFED_BYTES, kind_of_name, sniff_kind
from pipelines.data.table_files import Columns, read_columns
from qformer.errors import UserError

MANIFEST_FILE = "manifest.parquet"
"""Name of the manifest in a folder that `prepare` wrote."""
_DEFAULT_SPLIT = "train"
_COLUMNS = schema.MANIFEST_SCHEMA.names
_SINGULAR = {schema.CAPTION: schema.CAPTIONS, schema.INSTRUCTION: schema.INSTRUCTIONS}


def read_manifest(
    path: str, split: str | None = None, needs_captions: bool = False, kind: str | None = None
) -> pa.Table:
    """Read a manifest, or the folder that `prepare` wrote it into.

    Args:
        path: Any table that `read_source` reads, with our column names.
        split: Keep only this split's rows; None keeps all.
        needs_captions: Require at least one caption of every row.
        kind: Keep only "image" or "video" rows; None keeps both.

    Returns:
        Rows in `schema.MANIFEST_SCHEMA`.

    Raises:
        UserError: If it cannot be read, the split is empty, sample ids repeat, or captions are missing.
    """
    if storage.is_folder(path) and storage.exists(storage.join(path, MANIFEST_FILE)):
        path = storage.join(path, MANIFEST_FILE)
    table = read_source(path)
    if split is not None:
        table = _one_split(table, split, path)
    if not len(table):
        raise UserError(f"{path} holds no rows; prepare it from sources that do")
    if kind is not None:
        table = table.filter(pc.equal(table[schema.KIND], kind))
        if not len(table):
            raise UserError(f"{path} holds no {kind}s in split {split!r}; change data.kind or data.split")
    _require_unique(table, path)
    if needs_captions:
        _require_captions(table, path)
    return table


def read_source(
    path: str,
    *,
    format: str = "auto",  # noqa: A002 - the name that settings give it
    columns: Mapping[str, str] | None = None,
    media_root: str = "",
    kind: str = "auto",
    split: str = _DEFAULT_SPLIT,
) -> pa.Table:
    """Read one source of rows: a Parquet, JSONL or CSV table, or a folder of media files.

    Args:
        path: File or folder, local or fsspec URI.
        format: "parquet", "jsonl", "csv", "folder", or "auto" to tell by the name.
        columns: Our column name -> the table's own.
        media_root: Where relative media paths start; "" for the folder of the table.
        kind: "image", "video", or "auto" to take the table's column, else the file name, else the first bytes.
        split: Of rows that name none.

    Returns:
        Rows in `schema.MANIFEST_SCHEMA`. Rows without a sample id get their media path as one (with #2, #3 ... where
        a table names a media file again).

    Raises:
        UserError: If the source cannot be read or lacks what it must have.
    """
    _check_names(columns or {}, path)
    if not storage.exists(path):
        raise UserError(f"source {path} does not exist; check the path")
    is_folder = format == "folder" or (format == "auto" and storage.is_folder(path))
    if is_folder:
        found, root = _folder_columns(path), path
    else:
        found, root = _canonical(read_columns(path, format), columns or {}, path), storage.parent(path)
    return _build(found, media_root or root, kind, split, path)


def write_table(table: pa.Table, uri: str) -> None:
    """Write a Parquet file, atomically on local disks."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(uri, sink.getvalue())


def _check_names(columns: Mapping[str, str], path: str) -> None:
    allowed = [*_COLUMNS, *_SINGULAR]
    for name in columns:
        if name not in allowed:
            raise UserError(f"source {path}: columns maps {name!r}, which is no column of ours{nearest(name, allowed)}")


def nearest(name: str, choices: Collection[str]) -> str:
    """Say what was probably meant, for the end of an error message."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(sorted(choices))}"


def _folder_columns(path: str) -> Columns:
    if not storage.is_folder(path):
        raise UserError(f"source {path} is a file; format=folder wants a folder")
    names = [name for name in storage.list_files(path) if kind_of_name(name) is not None]
    if not names:
        raise UserError(f"folder {path} holds no image or video files; check the path")
    return {schema.MEDIA: names}


def _canonical(found: Columns, columns: Mapping[str, str], path: str) -> Columns:
    """Rename a table's columns to ours and drop the others."""
    renamed: Columns = {}
    for ours in (*_COLUMNS, *_SINGULAR):
        theirs = columns.get(ours, ours)
        if theirs in found:
            renamed[ours] = found[theirs]
        elif ours in columns:
            raise UserError(f"{path} has no column {theirs!r}{nearest(theirs, found)}")
    if schema.MEDIA not in renamed and schema.MEDIA_BYTES not in renamed:
        raise UserError(
            f"{path} has no column {schema.MEDIA!r} (or {schema.MEDIA_BYTES!r}) but "
            f"{', '.join(sorted(found)) or 'none'}; name it with columns: {{{schema.MEDIA}: ITS_NAME}}"
        )
    for one, several in _SINGULAR.items():
        if one in renamed:
            renamed.setdefault(several, renamed.pop(one))
    return renamed


def _build(found: Columns, root: str, kind: str, split: str, path: str) -> pa.Table:
    count = len(next(iter(found.values())))
    blank: list[Any] = [None] * count
    given = [_text(media) for media in found.get(schema.MEDIA, blank)]
    data = list(found.get(schema.MEDIA_BYTES, blank))
    media = [None if name is None else _absolute(name, root) for name in given]
    texts = [
        _paired(*pair, path)
        for pair in zip(found.get(schema.CAPTIONS, blank), found.get(schema.INSTRUCTIONS, blank), strict=True)
    ]
    splits = [_text(value) or split for value in found.get(schema.SPLIT, blank)]
    return pa.table(
        {
            schema.SAMPLE_ID: _sample_ids(found.get(schema.SAMPLE_ID, blank), given),
            schema.MEDIA: media,
            schema.MEDIA_BYTES: data,
            schema.KIND: _kinds(found.get(schema.KIND, blank), media, data, kind, path),
            schema.CAPTIONS: [captions for captions, _ in texts],
            schema.INSTRUCTIONS: [instructions for _, instructions in texts],
            schema.START_S: [_seconds(value, schema.START_S, path) for value in found.get(schema.START_S, blank)],
            schema.END_S: [_seconds(value, schema.END_S, path) for value in found.get(schema.END_S, blank)],
            schema.SPLIT: splits,
            schema.LICENCE: [_text(value) for value in found.get(schema.LICENCE, blank)],
        },
        schema=schema.MANIFEST_SCHEMA,
    )


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _absolute(media: str, root: str) -> str:
    if "://" in media and not storage.is_local(media):
        return media
    joined = media if storage.is_local(media) and media.startswith(("/", "file://")) else storage.join(root, media)
    return storage.local_path(joined) if storage.is_local(joined) else joined


def _sample_ids(values: list[Any], media: list[str | None]) -> list[str]:
    seen: dict[str, int] = {}
    ids = []
    for row, (value, name) in enumerate(zip(values, media, strict=True)):
        sample_id = _text(value)
        if sample_id is None:
            base = name or f"row-{row}"
            seen[base] = seen.get(base, 0) + 1
            sample_id = base if seen[base] == 1 else f"{base}#{seen[base]}"
        ids.append(sample_id)
    return ids


def _kinds(values: list[Any], media: list[str | None], data: list[bytes | None], kind: str, path: str) -> list[str]:
    kinds = []
    for value, name, content in zip(values, media, data, strict=True):
        found = kind if kind != "auto" else _text(value)
        if found is None:
            # What nothing identifies is tried as an image, and quarantined as unsupported.
            found = kind_of_name(name or "") or _sniffed(name, content) or schema.IMAGE
        if found not in schema.KINDS:
            raise UserError(f"{path}: column {schema.KIND!r} holds {found!r}{nearest(found, schema.KINDS)}")
        kinds.append(found)
    return kinds


def _sniffed(media: str | None, data: bytes | None) -> str | None:
    if data is not None:
        return sniff_kind(data[:SNIFFED_BYTES])
    if media is None or not storage.is_local(media):
        return None
    try:
        with storage.open_regular(media) as file:
            return sniff_kind(file.read(SNIFFED_BYTES))
    except OSError:
        return None  # the probe reports the file


def _paired(captions: Any, instructions: Any, path: str) -> tuple[list[str], list[str]]:
    """Captions that say something, and the instruction of each; one instruction serves all, none is no text."""
    answers, questions = _texts(captions, schema.CAPTIONS, path), _texts(instructions, schema.INSTRUCTIONS, path)
    if len(questions) > 1 and len(questions) != len(answers):
        raise UserError(
            f"{path}: a row has {len(answers)} {schema.CAPTIONS} but {len(questions)} {schema.INSTRUCTIONS}, "
            f"{questions[0][:60]!r} first; give one for all captions, or one for each"
        )
    if len(questions) > 1:
        questions = [question for question, answer in zip(questions, answers, strict=True) if answer]
    return [answer for answer in answers if answer], questions if any(questions) else []


def _texts(value: Any, column: str, path: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: column {column!r} holds {str(value)[:60]!r}; give a text or a list of texts")
    return [text.strip() for text in texts]


def _seconds(value: Any, column: str, path: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{path}: column {column!r} holds {value!r}; give seconds as a number") from None


def _one_split(table: pa.Table, split: str, path: str) -> pa.Table:
    kept = table.filter(pc.equal(table[schema.SPLIT], split))
    if not len(kept):
        there = sorted(set(table[schema.SPLIT].to_pylist()))
        raise UserError(f"split {split!r} of {path} is empty; it has {', '.join(there) or 'no rows'}")
    return kept


def _require_unique(table: pa.Table, path: str) -> None:
    names = table[schema.SAMPLE_ID].to_pylist()
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"{path}: sample_id {twice!r} occurs more than once; run `qformer prepare` on it first")


def _require_captions(table: pa.Table, path: str) -> None:
    counts = pc.list_value_length(table[schema.CAPTIONS]).to_pylist()
    missing = [row for row, count in enumerate(counts) if not count]
    if missing:
        first = table[schema.SAMPLE_ID][missing[0]].as_py()
        raise UserError(
            f"{path}: {len(missing)} of {len(table)} rows have no caption (the first is sample {first!r}); "
            f"add a column {schema.CAPTIONS!r}, or choose the rows that have some with data.split or data.kind"
        )
