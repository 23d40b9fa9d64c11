"""JSON Lines: one object a line."""

import json
from collections.abc import Iterator

from pipelines.data.corpus.sources.files import open_source
from pipelines.data.corpus.sources.raw import BadRow, RawRow
from pipelines.data.corpus.sources.text import lines


def read_jsonl(path: str) -> Iterator[RawRow | BadRow]:
    """Yield the rows; a line that is not a JSON object is a bad row.

    Raises:
        MediaError: If the file cannot be read.
    """
    with open_source(path) as file:
        for number, line in lines(file):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRow(number, place, "corrupt", f"not JSON ({str(error)[:80]}): {line[:60]!r}")
                continue
            if isinstance(values, dict):
                yield RawRow(number, place, values)
            else:
                yield BadRow(number, place, "corrupt", f"not a JSON object: {line[:60]!r}")
