"""Read Parquet, JSONL and CSV files into plain columns."""

import csv
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import schema, storage
from qformer.errors import UserError

Columns = dict[str, list[Any]]

_FORMAT_OF_EXTENSION = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}


def read_columns(path: str, format: str = "auto") -> Columns:  # noqa: A002 - the name that settings give it
    """Read a whole table.

    Args:
        path: Local path or fsspec URI.
        format: "parquet", "jsonl", "csv", or "auto" to tell by the extension.

    Raises:
        UserError: If it cannot be read or is of an unknown format.
    """
    known = format if format != "auto" else _format_of(path)
    try:
        match known:
            case "parquet":
                with storage.open_input(path) as file:
                    return dict(pq.read_table(file).to_pydict())
            case "jsonl":
                return _read_jsonl(path)
            case "csv":
                return _read_csv(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {path} as {known}: {reason}; check the file or set format") from error
    raise UserError(f"format {format!r} of {path} is unknown; choose from csv, folder, jsonl, parquet")


def _format_of(path: str) -> str:
    for extension, name in _FORMAT_OF_EXTENSION.items():
        if path.lower().endswith(extension):
            return name
    raise UserError(f"cannot tell the format of {path} by its name; set format to csv, folder, jsonl or parquet")


def _read_jsonl(path: str) -> Columns:
    rows = []
    with storage.open_input(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; give one object a line")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(path: str) -> Columns:
    with storage.open_input(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        rows = list(reader)
        names = reader.fieldnames or []
    columns: Columns = {name: [row[name] for row in rows] for name in names}
    for name in {schema.CAPTIONS, schema.INSTRUCTIONS} & columns.keys():
        columns[name] = [_json_list(text, name, path) for text in columns[name]]
    return columns


def _json_list(text: str | None, column: str, path: str) -> Any:
    """A CSV cell of texts: a JSON list when it looks like one, else one text."""
    if not text or not text.lstrip().startswith("["):
        return text or None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: column {column!r} holds {text[:60]!r}, no JSON list ({error.msg})") from error
