"""Files with the same bytes: within a split, and (worse) in training and in evaluation."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data import schema

COLUMNS = (
    *(schema.SAMPLE_ID, schema.MEDIA, schema.SPLIT, schema.START_S, schema.END_S),
    schema.CONTENT_HASH,
)
Row = Mapping[str, Any]


def find_duplicates(read: Callable[[list[str]], Iterable[pa.Table]]) -> pa.Table:
    """Find rows whose media has the same bytes as that of another row.

    Within a split, a row counts when an earlier row names another file with the same bytes; rows that share one file
    (several captions, several parts of a video) do not. A training row counts when an evaluation row shows the same
    bytes and, of a video, a part in common, whether by another file or the same.

    Takes 8 bytes a row, and more only for rows that are duplicates.

    Args:
        read: Yields all rows with the columns it is asked for, in the same order each time.

    Returns:
        In `schema.DUPLICATES_SCHEMA`; a training row that is in evaluation too is there once, as that.
    """
    # Half of the hash tells which rows to look at more closely.
    keys = np.concatenate(
        [np.empty(0, np.uint64), *(_keys(block) for block in read([schema.CONTENT_HASH]))], dtype=np.uint64
    )
    keys.sort()
    repeated = np.unique(keys[1:][keys[1:] == keys[:-1]])
    del keys
    suspects: list[Row] = []
    if len(repeated):
        for block in read(list(COLUMNS)):
            is_suspect = np.isin(_keys(block), repeated)
            suspects += block.filter(pa.array(is_suspect)).to_pylist() if is_suspect.any() else []
    suspects.sort(key=lambda row: row[schema.CONTENT_HASH])  # stable: the rows of a group stay in order
    found: list[dict[str, Any]] = []
    for _, group in itertools.groupby(suspects, key=lambda row: row[schema.CONTENT_HASH]):
        found += _of_group(list(group))
    return pa.Table.from_pylist(found, schema=schema.DUPLICATES_SCHEMA)


def is_leak(duplicates: pa.Table) -> NDArray[np.bool_]:
    """[rows of `find_duplicates`] whether it is a training row that evaluation shows, too."""
    splits = duplicates[schema.SPLIT].to_pylist()
    others = duplicates[schema.DUPLICATE_OF_SPLIT].to_pylist()
    return np.array([one != other for one, other in zip(splits, others, strict=True)], dtype=np.bool_)


def _of_group(group: list[Row]) -> list[dict[str, Any]]:
    evaluation = [row for row in group if row[schema.SPLIT] != schema.TRAIN]
    first: dict[str, Row] = {}
    found = []
    for row in group:
        earlier = first.setdefault(row[schema.SPLIT], row)
        other = earlier if _file(earlier) != _file(row) else None
        if row[schema.SPLIT] == schema.TRAIN:
            other = next((shown for shown in evaluation if _overlap(row, shown)), other)
        if other is not None:
            found.append(
                {
                    **{name: row[name] for name in (schema.SAMPLE_ID, schema.SPLIT, schema.MEDIA, schema.CONTENT_HASH)},
                    schema.DUPLICATE_OF: other[schema.SAMPLE_ID],
                    schema.DUPLICATE_OF_SPLIT: other[schema.SPLIT],
                }
            )
    return found


def _file(row: Row) -> str:
    """What tells files apart; content that stands in the row is a file of its own."""
    return row[schema.MEDIA] or f"row {row[schema.SAMPLE_ID]}"


def _overlap(one: Row, other: Row) -> bool:
    start_s = max(one[schema.START_S] or 0.0, other[schema.START_S] or 0.0)
    ends_s = (row[schema.END_S] for row in (one, other))
    return start_s < min(math.inf if end_s is None else end_s for end_s in ends_s)


def _keys(block: pa.Table) -> NDArray[np.uint64]:
    """The first 64 bits of each hash."""
    digits = "".join(text[:16] for text in block[schema.CONTENT_HASH].to_pylist())
    return np.frombuffer(bytes.fromhex(digits), dtype=np.uint64)
