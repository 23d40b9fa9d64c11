"""Manifests in parts, as large as a test wants; every row's contents follow from its number."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import schema
from pipelines.data.corpus.manifest_files import INDEX_FILE
from pipelines.data.order.permutation import derive_keys

_WORDS = ("black", "small", "green", "large", "happy", "quiet", "sunny", "empty") + (
    *("horse", "train", "house", "beach", "plate", "skier", "clock", "child"),
)
_CAPTION_WORDS = 8
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


def row_contents(row: int) -> dict:
    """What `write_parts` puts into the sample id, media and captions of a row."""
    number = f"{int(derive_keys(0, np.array([row]))[0]):016x}"
    words = [_WORDS[int(digit, 16)] for digit in number[:_CAPTION_WORDS]]
    return {
        schema.SAMPLE_ID: f"id-{number}",
        schema.MEDIA: f"s3://corpus/images/{number}.jpg",
        schema.CAPTIONS: [" ".join(words)],
    }


def write_parts(folder: Path, counts: dict[tuple[str, str], int], *, rows_per_part: int) -> Path:
    """Write a manifest of `counts` rows of each (kind, split), numbered through over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    index, first = [], 0
    for (kind, split), count in counts.items():
        for number, start in enumerate(range(0, count, rows_per_part)):
            rows = np.arange(first + start, first + min(start + rows_per_part, count))
            name = f"part-{kind}-{split}-{number:05d}.parquet"
            pq.write_table(
                _part(rows, kind, split),
                folder / name,
                row_group_size=1024,
                compression="zstd",
                use_dictionary=[schema.KIND, schema.SPLIT],
            )
            index.append({"file": name, "kind": kind, "split": split, "rows": len(rows)})
        first += count
    pq.write_table(pa.Table.from_pylist(index), folder / INDEX_FILE)
    return folder


def cut_into_parts(folder: Path, table: pa.Table, *, rows_per_part: int) -> Path:
    """Write a table, whose rows are of one kind and split, as a manifest in parts."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, split = table[schema.KIND][0].as_py(), table[schema.SPLIT][0].as_py()
    index = []
    for number, start in enumerate(range(0, len(table), rows_per_part)):
        part, name = table.slice(start, rows_per_part), f"part-{kind}-{split}-{number:05d}.parquet"
        pq.write_table(part, folder / name)
        index.append({"file": name, "kind": kind, "split": split, "rows": len(part)})
    pq.write_table(pa.Table.from_pylist(index), folder / INDEX_FILE)
    return folder


def _part(rows: np.ndarray, kind: str, split: str) -> pa.Table:
    count = len(rows)
    columns = {name: pa.nulls(count, schema.MANIFEST_SCHEMA.field(name).type) for name in schema.MANIFEST_SCHEMA.names}
    keys = derive_keys(0, rows)
    digits = ((keys[:, None] >> np.arange(60, -4, -4, dtype=np.uint64)) & np.uint64(15)).astype(np.uint8)
    spaced = np.frombuffer(b"".join(f"{word} ".encode() for word in _WORDS), dtype=np.uint8).reshape(len(_WORDS), -1)
    texts = spaced[digits[:, :_CAPTION_WORDS]].reshape(count, -1)
    columns |= {
        schema.SAMPLE_ID: _strings("id-", _DIGITS[digits], ""),
        schema.MEDIA: _strings("s3://corpus/images/", _DIGITS[digits], ".jpg"),
        schema.CAPTIONS: pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1, dtype=np.int32)), _strings("", texts[:, :-1], "")
        ),
        schema.KIND: pa.array(np.full(count, kind)),
        schema.SPLIT: pa.array(np.full(count, split)),
    }
    for name, column in columns.items():
        field = schema.MANIFEST_SCHEMA.field(name)
        if not field.nullable and column.null_count:  # a column that a later schema added
            columns[name] = pa.array([[]] * count, field.type)
    return pa.table(columns, schema=schema.MANIFEST_SCHEMA)


def _strings(before: str, letters: np.ndarray, after: str) -> pa.Array:
    """Strings of one length each, made without a Python string a row."""
    count, width = letters.shape
    ends = [np.tile(np.frombuffer(text.encode(), dtype=np.uint8), (count, 1)) for text in (before, after)]
    joined = np.concatenate([ends[0], letters, ends[1]], axis=1)
    offsets = np.arange(count + 1, dtype=np.int32) * joined.shape[1]
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(joined))
