"""CSV tables with a header line."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

from pipelines.data import schema
from pipelines.data.corpus.sources.files import open_source
from pipelines.data.corpus.sources.raw import BadRow, RawRow
from pipelines.data.corpus.sources.text import ERRORS
from qformer.errors import UserError


def read_csv(path: str) -> Iterator[RawRow | BadRow]:
    """Yield the rows; one with too many or too few fields, or wrong quotes, is a bad row.

    Raises:
        UserError: If there is no header line.
        MediaError: If the file cannot be read.
    """
    with open_source(path) as file:
        # Strict, because otherwise an unclosed quote would silently consume the rest of the file.
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors=ERRORS, newline=""), strict=True)
        try:
            names = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"cannot read {path} as csv: its first line: {error}; check the file or set format"
            ) from None
        if not names:
            raise UserError(f"{path} is empty; a CSV file begins with a line of column names")
        for number in itertools.count(1):
            place = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield BadRow(number, place, "corrupt", f"not CSV ({error})")
                continue
            if cells is None:
                return
            if not cells:
                continue  # an empty line
            yield _row(number, place, names, cells)


def header(path: str) -> list[str]:
    """The column names of a CSV file; none when it has no readable first line.

    Raises:
        MediaError: If the file cannot be read.
    """
    with open_source(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors=ERRORS, newline="")
        try:
            return next(csv.reader(text), [])
        except csv.Error:
            return []


def _row(number: int, place: str, names: list[str], cells: list[str]) -> RawRow | BadRow:
    if len(cells) != len(names):
        return BadRow(number, place, "corrupt", f"{len(cells)} fields where the header has {len(names)}")
    values: dict[str, Any] = dict(zip(names, cells, strict=True))
    for name in (schema.CAPTIONS, schema.INSTRUCTIONS):
        text = values.get(name)
        if text and text.replace(" ", "").startswith('["'):
            # A cell contains several texts as a JSON list.
            try:
                values[name] = json.loads(text)
            except (ValueError, RecursionError):
                return BadRow(number, place, "corrupt", f"column {name!r} holds {text[:60]!r}, no JSON list")
    return RawRow(number, place, values)
