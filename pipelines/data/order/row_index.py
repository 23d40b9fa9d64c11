"""Manifests as numbered rows in any order; large ones without reading them as a whole.

A manifest in parts (`manifest_files`) is never held in memory. To take rows, the footers of their parts and the row
groups with the rows are read, from many parts at the same time, and kept in caches.
"""

import bisect
import functools
import hashlib
import itertools
import posixpath
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data import schema, storage
from pipelines.data.corpus.manifest_files import INDEX_FILE, read_index
from pipelines.data.failures import MediaError
from pipelines.data.order.lru_cache import LruCache
from pipelines.data.storage.retries import with_retries
from qformer.errors import UserError

ValueT = TypeVar("ValueT")

_FILE, _ROWS = "file", "rows"
_SKIPPED_COLUMNS = (schema.SPLIT, schema.LICENCE)
"""Columns that are not read."""
_FINGERPRINT_COLUMNS = (
    *(schema.MEDIA, schema.MEDIA_BYTES, schema.SAMPLE_ID, schema.CAPTIONS, schema.INSTRUCTIONS),
    *(schema.START_S, schema.END_S),
)
"""Columns that decide what training gets from a row."""
_FOOTER_CACHE_BYTES = 8 * 1024**2
"""Size of the cached footers as stored; parsed they take about six times as much."""
_GROUP_CACHE_BYTES = 64 * 1024**2
_CHUNK_ROWS = 8192
_READERS = 32
"""Parts read at the same time: remote stores have a high latency, but serve many requests in parallel."""


class ManifestRows(Protocol):
    """Numbered rows of a manifest: all of one kind, then all of the next, in the order of `schema.KINDS`."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each kind present."""

    @property
    def fingerprint(self) -> str:
        """Digest that changes when rows are added, dropped, moved or edited."""

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Rows by number, in the given order; may lack `schema.SPLIT` and `schema.LICENCE`."""


def count_rows(rows: ManifestRows) -> int:
    """Number of rows of all kinds."""
    return sum(rows.counts.values())


def stream_rows(rows: ManifestRows) -> Iterator[pa.Table]:
    """Yield all rows in order, a few thousand at a time."""
    count = count_rows(rows)
    for start in range(0, count, _CHUNK_ROWS):
        yield rows.take(np.arange(start, min(count, start + _CHUNK_ROWS)))


class TableRows:
    """A manifest in memory.

    Args:
        table: Rows in any order.
    """

    def __init__(self, table: pa.Table) -> None:
        kinds = [table.filter(pc.equal(table[schema.KIND], kind)) for kind in schema.KINDS]
        self.counts = {kind: len(part) for kind, part in zip(schema.KINDS, kinds, strict=True) if len(part)}
        self._table = pa.concat_tables(kinds).combine_chunks()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of ids, texts, clip bounds and media of the rows in their order.

        For media, the last part of the path counts, because a corpus may be moved as a whole; or the bytes in the row.
        """
        digest = hashlib.sha256(repr(self.counts).encode())
        for rows in stream_rows(self):
            columns = (rows[name].to_pylist() for name in _FINGERPRINT_COLUMNS)
            for media, content, *values in zip(*columns, strict=True):
                # `ascii` separates the values, and accepts invalid Unicode.
                name = None if media is None else media.rpartition("/")[2]
                digest.update(ascii((name, *values)).encode())
                digest.update(content or b"")
        return digest.hexdigest()

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """See `ManifestRows`."""
        return self._table.take(pa.array(rows))


@dataclass(frozen=True, slots=True)
class _Part:
    """One Parquet file of the manifest. Its repr, the name included, enters the fingerprint."""

    file: str
    kind: str
    num_rows: int
    size_bytes: int


class PartRows:
    """A manifest in Parquet parts. Picklable; a copy starts with empty caches.

    Args:
        folder: Folder of index and parts, a local path or URI.
        split: Split of the rows to take; None takes all.
        kind: Kind of the rows to take, "image" or "video"; None takes both.

    Raises:
        UserError: If a part is missing, or no row is left.
    """

    def __init__(self, folder: str, split: str | None = None, kind: str | None = None) -> None:
        # Decode actors on this machine have another working directory.
        self.folder = storage.local_path(folder) if storage.is_local(folder) else folder
        parts = _parts(self.folder, split, kind)
        self._parts = [part for name in schema.KINDS for part in parts if part.kind == name]
        self._ends = list(itertools.accumulate(part.num_rows for part in self._parts))
        self.counts: dict[str, int] = {}
        for part in self._parts:
            self.counts[part.kind] = self.counts.get(part.kind, 0) + part.num_rows
        self._reset_caches()

    @property
    def fingerprint(self) -> str:
        """Digest of the parts' names, row counts and sizes."""
        return hashlib.sha256(repr(self._parts).encode()).hexdigest()

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """See `ManifestRows`.

        Raises:
            UserError: If a part cannot be read, or does not match the index.
        """
        if not len(rows):
            return self._pieces(0, np.zeros(1, np.int64))[0][0].slice(0, 0)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        parts = np.searchsorted(self._ends, ascending, side="right")
        numbers, starts = np.unique(parts, return_index=True)
        wanted = list(zip(numbers.tolist(), np.split(ascending, starts[1:]), strict=True))
        pieces = []
        # One thread a part, because a file is read at one position at a time.
        with ThreadPoolExecutor(min(_READERS, len(wanted))) as pool:
            for part_pieces in pool.map(lambda part_rows: self._pieces(*part_rows), wanted):
                pieces += part_pieces
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(pieces).take(pa.array(back))

    def _pieces(self, number: int, rows: NDArray[np.int64]) -> list[pa.Table]:
        """Rows of one part in ascending order, one table for each of its row groups."""
        file, ends = self._footers.get(number) or self._open_part(number)
        places = rows - (self._ends[number] - self._parts[number].num_rows)
        pieces, at = [], 0
        while at < len(places):
            group = bisect.bisect_right(ends, places[at])
            table = self._groups.get((number, group)) or self._group(number, group, file)
            begun, at = at, int(np.searchsorted(places, ends[group]))
            pieces.append(table.take(pa.array(places[begun:at] - (ends[group - 1] if group else 0))))
        return pieces

    def _open_part(self, number: int) -> tuple[pq.ParquetFile, list[int]]:
        part = self._parts[number]
        uri = storage.join(self.folder, part.file)
        file = _read(uri, lambda: _open_parquet(uri, self))
        footer = file.metadata
        if footer.num_rows != part.num_rows:
            raise UserError(
                f"{part.file} in {self.folder} has {footer.num_rows} rows where {INDEX_FILE} says {part.num_rows}; "
                "run `qformer prepare` again"
            )
        ends = list(itertools.accumulate(footer.row_group(group).num_rows for group in range(footer.num_row_groups)))
        self._footers.put(number, (file, ends), footer.serialized_size)
        return file, ends

    def _group(self, number: int, group: int, file: pq.ParquetFile) -> pa.Table:
        names = [name for name in file.schema_arrow.names if name not in _SKIPPED_COLUMNS]
        uri = storage.join(self.folder, self._parts[number].file)
        table = _read(uri, lambda: file.read_row_group(group, columns=names, use_threads=False)).combine_chunks()
        self._groups.put((number, group), table, table.nbytes)
        return table

    def count_read(self, num_bytes: int) -> None:
        """Add to `bytes_read`; thread-safe, because several threads read."""
        with self._count_lock:
            self.bytes_read += num_bytes

    def _reset_caches(self) -> None:
        self.bytes_read = 0
        """Bytes that this object has read so far, footers included."""
        self._footers, self._groups = LruCache(_FOOTER_CACHE_BYTES), LruCache(_GROUP_CACHE_BYTES)
        self._count_lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        pickled = ("folder", "counts", "_parts", "_ends")
        return {name: value for name, value in vars(self).items() if name in pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_caches()


class _CountedFile:
    """A file for pyarrow that counts the bytes read."""

    def __init__(self, uri: str, rows: PartRows) -> None:
        if storage.is_local(uri):
            self._file: Any = open(storage.local_path(uri), "rb", buffering=0)  # noqa: SIM115 - closed by pyarrow
        else:
            # Row groups are at random positions, so fsspec's default read-ahead would never be used.
            filesystem, path = fsspec.core.url_to_fs(uri)
            self._file = filesystem.open(path, "rb", cache_type="none")
        self._rows = rows
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._file.read(size)
        self._rows.count_read(len(content))
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self.closed = True
        self._file.close()


def _open_parquet(uri: str, rows: PartRows) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(_CountedFile(uri, rows), mode="r"), pre_buffer=True)


def _read(uri: str, read: Callable[[], ValueT]) -> ValueT:
    """Read a file of a manifest, with retries for transient failures of the storage.

    Raises:
        UserError: If the retries fail, too: a run cannot continue without its manifest.
    """

    def checked() -> ValueT:
        try:
            return read()
        except pa.ArrowInvalid as error:
            message = f"{uri} is damaged ({str(error)[:100]}); run `qformer prepare` again"
            raise MediaError("corrupt", message, stage="read") from error

    try:
        return with_retries(uri, checked)
    except MediaError as error:
        raise UserError(f"the manifest cannot be read: {error.message}") from error


def _parts(folder: str, split: str | None, kind: str | None) -> list[_Part]:
    filesystem, path = fsspec.core.url_to_fs(folder)
    found = _read(folder, lambda: filesystem.find(path, detail=True))
    sizes = {posixpath.basename(name): entry["size"] for name, entry in found.items()}
    parts, splits, kinds = [], set(), set()
    for row in _read(folder, lambda: read_index(folder)).to_pylist():
        splits.add(row[schema.SPLIT])
        if row[_FILE] not in sizes:
            raise UserError(f"manifest {folder} lacks {row[_FILE]}; run `qformer prepare` again")
        if split in (None, row[schema.SPLIT]) and row[_ROWS]:
            kinds.add(row[schema.KIND])
            if kind in (None, row[schema.KIND]):
                parts.append(_Part(row[_FILE], row[schema.KIND], row[_ROWS], sizes[row[_FILE]]))
    if not kinds:
        raise UserError(f"split {split!r} of {folder} is empty; it has {', '.join(sorted(splits)) or 'no rows'}")
    if not parts:
        raise UserError(f"{folder} holds no {kind}s in split {split!r}; change data.kind or data.split")
    return parts
