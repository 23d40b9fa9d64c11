"""The files of a manifest: one Parquet file, or a folder of parts with one kind and split each.

A row group has 1,024 rows, or fewer where rows contain their media's bytes, so that reading any row reads little else.
The index is written last: a folder without it is not finished.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data import schema, storage

MANIFEST_FILE = "manifest.parquet"
"""Name of the manifest in an output folder of `prepare`."""
MANIFEST_FOLDER, INDEX_FILE = "manifest", "index.parquet"
"""Folder and index that replace `MANIFEST_FILE` where there are more rows."""
MAX_FILE_ROWS = 1_000_000
"""Number of rows from which a manifest is written in parts."""
MAX_FILE_MEDIA_BYTES = 64 * 1024**2
"""Bytes of media inside the rows above which a manifest is written in parts: a single file is read as a whole."""
PART_ROWS = 131_072
"""Rows of a part. To read any row, its part's footer is read first: 128 row groups take 100 KB."""
PART_MEDIA_BYTES = 1024**3
"""Bytes of media that end a part sooner, so that its footer stays small."""
ROW_GROUP_ROWS, ROW_GROUP_MEDIA_BYTES = 1024, 4 * 1024**2
"""Largest number of rows of a row group, and approximate limit of its bytes of media."""
_MARK = {b"qformer": b"manifest"}
_MARKED_SCHEMA = schema.MANIFEST_SCHEMA.with_metadata(_MARK)


def manifest_files(output: str) -> list[str]:
    """The manifest files in an output folder of `prepare`, in order; none in any other folder."""
    if not storage.is_folder(output):
        return []
    if storage.exists(single := storage.join(output, MANIFEST_FILE)):
        return [single]
    for folder in (storage.join(output, MANIFEST_FOLDER), output):
        if storage.exists(storage.join(folder, INDEX_FILE)):
            return [storage.join(folder, name) for name in read_index(folder)["file"].to_pylist()]
    return []


def read_index(folder: str) -> pa.Table:
    """The part files of a manifest folder, in `schema.INDEX_SCHEMA`."""
    with storage.open_regular(storage.join(folder, INDEX_FILE)) as file:
        return pq.read_table(file, schema=schema.INDEX_SCHEMA)


def is_marked(path: str) -> bool:
    """Whether a Parquet file is marked as checked by `prepare`."""
    if not path.lower().endswith(".parquet") or not storage.exists(path) or storage.is_folder(path):
        return False
    try:
        with storage.open_regular(path) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException):
        return False  # the reader reports the error
    return all(metadata.get(key) == value for key, value in _MARK.items())


def iterate_rows(output: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield all rows of a written manifest in order, in chunks; only `columns` where given."""
    names = columns if columns is not None else schema.MANIFEST_SCHEMA.names
    for path in manifest_files(output):
        with storage.open_regular(path) as file:
            parquet = pq.ParquetFile(file)
            # One row group at a time: where rows contain their media, groups are small.
            for group in range(parquet.num_row_groups):
                batches = parquet.iter_batches(batch_size=ROW_GROUP_ROWS, row_groups=[group], columns=names)
                for batch in batches:
                    yield pa.Table.from_batches([batch]).select(names).replace_schema_metadata(None)


def write_manifest(blocks: Iterable[pa.Table], num_rows: int, output: str) -> None:
    """Write a manifest into a folder that has none.

    It is written in parts if it has `MAX_FILE_ROWS` rows or more, or more than `MAX_FILE_MEDIA_BYTES` of media.

    Args:
        blocks: Rows of the manifest.
        num_rows: Number of these rows.
        output: Folder.
    """
    single, folder = storage.join(output, MANIFEST_FILE), storage.join(output, MANIFEST_FOLDER)
    if num_rows >= MAX_FILE_ROWS:
        _write_parts(blocks, folder, [])
    elif _write_file(blocks, single) > MAX_FILE_MEDIA_BYTES:
        _write_parts(iterate_rows(output), folder, [])
        storage.remove_file(single)


def append_rows(rows: pa.Table, output: str) -> None:
    """Append rows to a written manifest. A reader sees either the old rows or all."""
    folder = storage.join(output, MANIFEST_FOLDER)
    if storage.exists(storage.join(folder, INDEX_FILE)):
        _write_parts([rows], folder, read_index(folder).to_pylist())
        return
    single = storage.join(output, MANIFEST_FILE)
    with storage.open_regular(single) as file:
        num_rows = pq.read_metadata(file).num_rows + len(rows)
    blocks = itertools.chain(iterate_rows(output), [rows])
    if num_rows >= MAX_FILE_ROWS:
        _write_parts(blocks, folder, [])
        storage.remove_file(single)
        return
    # A new file, because some stores would empty the one that is being read.
    fresh = f"{single}.new"
    media_bytes = _write_file(blocks, fresh)
    storage.move_file(fresh, single)
    if media_bytes > MAX_FILE_MEDIA_BYTES:
        _write_parts(iterate_rows(output), folder, [])
        storage.remove_file(single)


def _write_file(blocks: Iterable[pa.Table], uri: str) -> int:
    """Write one file; return the bytes of media in its rows."""
    with _PartWriter(uri) as part:
        for block in blocks:
            part.append(block)
    return part.media_bytes


def _write_parts(blocks: Iterable[pa.Table], folder: str, index: list[dict[str, Any]]) -> None:
    with contextlib.ExitStack() as open_parts:
        parts: dict[tuple[str, str], _PartWriter] = {}
        for block in blocks:
            for kind, split in _groups(block):
                is_member = pc.and_(pc.equal(block[schema.KIND], kind), pc.equal(block[schema.SPLIT], split))
                rows = block.filter(is_member)
                while len(rows):
                    part = parts.get((kind, split))
                    if part is None or part.is_full:
                        stem = f"part-{kind}-{_file_name(split)}"
                        number = sum(row["file"].startswith(f"{stem}-") for row in index)
                        name = f"{stem}-{number:05d}.parquet"
                        part = parts[kind, split] = open_parts.enter_context(_PartWriter(storage.join(folder, name)))
                        index.append({"file": name, schema.KIND: kind, schema.SPLIT: split, "rows": 0, "part": part})
                    fitting = rows.slice(0, PART_ROWS - part.num_rows)
                    part.append(fitting)
                    if part.is_full:
                        part.close()
                    rows = rows.slice(len(fitting))
    rows_of_parts = [{**row, "rows": row["part"].num_rows if "part" in row else row["rows"]} for row in index]
    with storage.open_output(storage.join(folder, INDEX_FILE)) as file:
        pq.write_table(pa.Table.from_pylist(rows_of_parts, schema=schema.INDEX_SCHEMA), file)


class _PartWriter(contextlib.AbstractContextManager["_PartWriter"]):
    """Writes one Parquet file in row groups of equal size."""

    def __init__(self, uri: str) -> None:
        self.num_rows = self.media_bytes = 0
        self._buffer: list[pa.Table] = []
        self._num_buffered = self._buffered_bytes = 0
        self._stack = contextlib.ExitStack()
        file = self._stack.enter_context(storage.open_output(uri))
        self._writer = self._stack.enter_context(
            pq.ParquetWriter(file, _MARKED_SCHEMA, compression="zstd", write_statistics=False)
        )

    @property
    def is_full(self) -> bool:
        """Whether further rows need another part."""
        return self.num_rows >= PART_ROWS or self.media_bytes >= PART_MEDIA_BYTES

    def append(self, rows: pa.Table) -> None:
        added_bytes = int(_media_bytes(rows).sum())
        self.num_rows += len(rows)
        self.media_bytes += added_bytes
        self._num_buffered += len(rows)
        self._buffered_bytes += added_bytes
        self._buffer.append(rows.select(schema.MANIFEST_SCHEMA.names))
        if self._num_buffered >= ROW_GROUP_ROWS or self._buffered_bytes >= ROW_GROUP_MEDIA_BYTES:
            self._flush(is_last=False)

    def close(self) -> None:
        """Finish the file; more rows are an error."""
        if self._num_buffered:
            self._flush(is_last=True)
        self._stack.close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)

    def _flush(self, *, is_last: bool) -> None:
        joined = pa.concat_tables(self._buffer)
        sizes, start = _media_bytes(joined), 0
        ends = np.cumsum(sizes)
        while start < len(joined):
            # A row that reaches the limit is the last of its group.
            limit = (int(ends[start - 1]) if start else 0) + ROW_GROUP_MEDIA_BYTES
            end = min(start + ROW_GROUP_ROWS, int(np.searchsorted(ends, limit)) + 1)
            if end > len(joined) or (end == len(joined) and end - start < ROW_GROUP_ROWS and ends[-1] < limit):
                if not is_last:
                    break
                end = len(joined)
            group = joined.slice(start, end - start).cast(_MARKED_SCHEMA)
            self._writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
            start = end
        self._buffer = [joined.slice(start)]
        self._num_buffered = len(joined) - start
        self._buffered_bytes = int(sizes[start:].sum())


def _media_bytes(rows: pa.Table) -> NDArray[np.int64]:
    """Bytes of media inside each row."""
    lengths = pc.fill_null(pc.binary_length(rows[schema.MEDIA_BYTES]), 0)
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _groups(block: pa.Table) -> list[tuple[str, str]]:
    pairs = zip(block[schema.KIND].to_pylist(), block[schema.SPLIT].to_pylist(), strict=True)
    return list(dict.fromkeys(pairs))


def _file_name(split: str) -> str:
    """A split's name with characters that file names allow; the index has the original name."""
    return "".join(letter if letter.isalnum() or letter in "_." else "_" for letter in split)
