"""Files with the same bytes: within a split, or (worse) in both training and evaluation."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data import schema

COLUMNS = (
    *(schema.SAMPLE_ID, schema.MEDIA, schema.SPLIT, schema.START_S, schema.END_S),
    schema.CONTENT_HASH,
)
_FILE_COLUMNS = (schema.SAMPLE_ID, schema.MEDIA, schema.SPLIT, schema.CONTENT_HASH)
_COMPARED_ROWS = 1_000_000
"""Rows compared at the same time, about 1 GB as Python objects; more rows take another pass."""
Row = Mapping[str, Any]


def find_duplicates(read: Callable[[list[str]], Iterable[pa.Table]]) -> pa.Table:
    """Find rows whose media has the same bytes as that of another row.

    Within a split, a row counts when an earlier row names another file with the same bytes; rows that share one file
    (several captions, several parts of a video) do not. A training row counts when an evaluation row shows the same
    bytes and, of a video, a part in common, whether by another file or the same.

    Memory: 8 bytes a row, 17 for each content that several rows share, the duplicates, and at most `_COMPARED_ROWS`
    rows at a time, or all those of one content. Rows that share one file of one split are never held.

    Args:
        read: Function that yields all rows with the given columns, in the same order each time.

    Returns:
        Table in `schema.DUPLICATES_SCHEMA`, sorted by content. A training row that evaluation shows, too, is listed
        once, with the evaluation row.
    """
    found = [schema.DUPLICATES_SCHEMA.empty_table()]
    for wanted in _portions(*_repeated_keys(read)):
        rows: list[Row] = []
        for block in read(list(COLUMNS)):
            is_wanted = _places(_keys(block), wanted) >= 0
            rows += block.filter(pa.array(is_wanted)).to_pylist() if is_wanted.any() else []
        rows.sort(key=lambda row: row[schema.CONTENT_HASH])  # stable: the rows of a group stay in order
        groups = itertools.groupby(rows, key=lambda row: row[schema.CONTENT_HASH])
        duplicates = [row for _, group in groups for row in _duplicates_of_group(list(group))]
        found.append(pa.Table.from_pylist(duplicates, schema=schema.DUPLICATES_SCHEMA))
    return pa.concat_tables(found)


def is_leak(duplicates: pa.Table) -> NDArray[np.bool_]:
    """[rows of `find_duplicates`] True for training rows whose media is in evaluation, too."""
    splits = duplicates[schema.SPLIT].to_pylist()
    others = duplicates[schema.DUPLICATE_OF_SPLIT].to_pylist()
    return np.array([one != other for one, other in zip(splits, others, strict=True)], dtype=np.bool_)


def _repeated_keys(read: Callable[[list[str]], Iterable[pa.Table]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys of contents with several files in a split, or files in several splits; and the number of rows of each."""
    keys = np.concatenate(
        [np.empty(0, np.uint64), *(_keys(block) for block in read([schema.CONTENT_HASH]))], dtype=np.uint64
    )
    keys.sort()
    repeated = np.unique(keys[1:][keys[1:] == keys[:-1]])
    del keys
    counts, files = np.zeros(len(repeated), np.int64), np.zeros(len(repeated), np.int64)
    is_mixed = np.zeros(len(repeated), np.bool_)
    for block in read(list(_FILE_COLUMNS)) if len(repeated) else ():
        places = _places(_keys(block), repeated)
        chosen = np.flatnonzero(places >= 0)
        if not len(chosen):
            continue
        places = places[chosen]
        rows = block.select([schema.SAMPLE_ID, schema.MEDIA, schema.SPLIT]).take(pa.array(chosen)).to_pylist()
        shown = np.fromiter((hash((row[schema.SPLIT], _file(row))) or 1 for row in rows), np.int64, len(rows))
        is_new = files[places] == 0
        files[places[is_new]] = shown[is_new]  # of several files the last one; the others differ from it below
        is_mixed[places[files[places] != shown]] = True
        np.add.at(counts, places, 1)
    return repeated[is_mixed], counts[is_mixed]


def _portions(keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
    """Split the keys into ranges of at most `_COMPARED_ROWS` rows, or of one key."""
    start = rows = 0
    for place, count in enumerate(counts.tolist()):
        if rows and rows + count > _COMPARED_ROWS:
            yield keys[start:place]
            start, rows = place, 0
        rows += count
    if len(keys):
        yield keys[start:]


def _places(keys: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Index of each key among the wanted keys, which are sorted; -1 where it is none of them."""
    places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    return np.where(wanted[places] == keys, places, -1)


def _duplicates_of_group(group: list[Row]) -> list[dict[str, Any]]:
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
    """Identity of a row's file; bytes inside a row are a file of their own."""
    return row[schema.MEDIA] or f"row {row[schema.SAMPLE_ID]}"


def _overlap(one: Row, other: Row) -> bool:
    start_s = max(one[schema.START_S] or 0.0, other[schema.START_S] or 0.0)
    ends_s = (row[schema.END_S] for row in (one, other))
    return start_s < min(math.inf if end_s is None else end_s for end_s in ends_s)


def _keys(block: pa.Table) -> NDArray[np.uint64]:
    """The first 64 bits of each hash; their order is that of the hashes."""
    digits = "".join(text[:16] for text in block[schema.CONTENT_HASH].to_pylist())
    return np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64)
