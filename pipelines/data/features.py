"""The feature cache: what the frozen encoder sees, computed once and stored beside the corpus.

CACHE/
    features.json            what made it (`FeatureSpec`), and its fingerprint
    shard-00000000.arrow     Arrow IPC, one record batch a row, so that any row is one read away
    shard-00000000.parquet   which rows the shard holds; written after it, so a shard without it is unfinished
    index.parquet            all shards' rows; written last, and removed before a finished cache is changed
    quarantine.parquet       rows without features, and why

A shard is a block of consecutive manifest rows of one kind; its bytes follow from manifest and spec alone. Rows that
cannot be decoded keep their place, with the reason, so that training on the cache quarantines what pixels would have.
Where the reason may pass (`PASSING`), the next run of the job makes the shard anew.

A row is known by its id, its media and its clip bounds, and a local file also by its size and time of change: one that
was replaced in place is encoded anew when the job runs again. A remote file that was replaced under its name goes
unnoticed, for asking a store about every file may take hours; give it another name.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data import members, quarantine, schema, storage
from pipelines.data.batch import IMAGE_ID, Failure, ImageRows, SampleBatch, pack
from pipelines.data.feature_spec import FeatureSpec, read_spec
from pipelines.data.plan import evaluation_blocks, image_ids
from pipelines.data.row_index import TableRows
from pipelines.data.samples import DecodeSettings
from pipelines.data.stage_costs import StageCosts
from pipelines.data.token_codec import RAW_DTYPES, TokenDtype, encode_tokens
from qformer.errors import UserError

INDEX_FILE, QUARANTINE_FILE = "index.parquet", "quarantine.parquet"
PASSING = ("transient", "timeout")
"""Failures that another try may mend."""
_SOURCE, STATE = "source", "state"
_OPEN_SHARDS = 64
_SHARD_PIXEL_BYTES = 64 * 1024**2
"""Pixels that one shard is made of: what a decode actor hands to an encoder actor at a time."""
_MAX_SHARD_ROWS = 4096
_INDEX_SCHEMA = pa.schema(
    [
        (schema.SAMPLE_ID, pa.string()),
        (_SOURCE, pa.int64()),
        (schema.FEATURE_SHARD, pa.int32()),
        (schema.FEATURE_ROW, pa.int32()),
        (schema.ERROR_CLASS, pa.string()),
    ]
)
_ROWS_SCHEMA = pa.schema(
    [
        *_INDEX_SCHEMA,
        (STATE, pa.string()),
        (schema.MEDIA, pa.string()),
        (schema.STAGE, pa.string()),
        (schema.MESSAGE, pa.string()),
        (schema.TRIES, pa.int32()),
    ]
)
"""Of a shard's list of rows; media and what follows only of those that failed."""
_SHARD_SCHEMA = pa.schema(
    [
        (schema.SAMPLE_ID, pa.string()),
        (_SOURCE, pa.int64()),
        ("shape", pa.list_(pa.int32())),
        ("tokens", pa.large_binary()),
        ("frame_valid", pa.list_(pa.bool_())),
        (schema.STAGE, pa.string()),
        (schema.ERROR_CLASS, pa.string()),
        (schema.MESSAGE, pa.string()),
        (schema.TRIES, pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """A finished cache, ready to be read."""

    folder: str
    spec: FeatureSpec
    is_random: bool = False
    """Never: cached features are of the plain picture and of frames chosen without chance."""

    def row_bytes(self, kind: str) -> int:
        """Bytes of one sample."""
        return self.spec.row_bytes(kind)


def open_cache(folder: str) -> FeatureCache:
    """Open a finished cache.

    Raises:
        UserError: If there is none, or it is unfinished or of another format.
    """
    spec = read_spec(folder)
    if spec is None or not storage.exists(storage.join(folder, INDEX_FILE)):
        what = "is not finished" if spec else "holds no feature cache"
        raise UserError(f"data.features={folder} {what}; run `qformer features --set output={folder}` first")
    return FeatureCache(folder, spec)


def shard_blocks(manifest: pa.Table, decode: DecodeSettings) -> list[pa.Table]:
    """Cut a manifest into the rows of each shard, in the form that `DecodeRows` takes; equal for equal input."""
    largest = max(map(decode.row_bytes, pc.unique(manifest[schema.KIND]).to_pylist()), default=1)
    rows_per_shard = int(np.clip(_SHARD_PIXEL_BYTES // largest, 1, _MAX_SHARD_ROWS))
    return list(evaluation_blocks(TableRows(manifest), rows_per_shard))


def file_states(media: Iterable[str | None]) -> list[str | None]:
    """Size and time of change of local files (of a tar member: of its shard); None of all others."""
    known: dict[str, str | None] = {}
    states: list[str | None] = []
    for uri in media:
        member = None if uri is None else members.parse(uri)
        path = uri if member is None else member.shard
        if path is not None and path not in known:
            known[path] = None
            if storage.is_local(path):
                with contextlib.suppress(OSError, ValueError):  # whoever reads it tells what is wrong
                    status = os.stat(storage.local_path(path))
                    known[path] = f"{status.st_size}/{status.st_mtime_ns}"
        states.append(None if path is None else known[path])
    return states


def finished_shard(folder: str, shard: int, rows: pa.Table) -> bool:
    """Whether `shard` is there with exactly these rows, of files as they are now, and no failure that may pass.

    Files that are gone count as unchanged: the features of what they held stay good.

    Args:
        folder: Of the cache.
        shard: Its number.
        rows: One of `shard_blocks`.
    """
    path = storage.join(folder, _rows_file(shard))
    if not storage.exists(path):
        return False
    found = _read_table(path)
    states = zip(found[STATE].to_pylist(), file_states(rows[schema.MEDIA].to_pylist()), strict=False)
    return bool(
        found[schema.SAMPLE_ID].to_pylist() == rows[schema.SAMPLE_ID].to_pylist()
        and found[_SOURCE].to_pylist() == image_ids(rows)
        and all(now is None or now == then for then, now in states)
        and not pc.any(pc.is_in(found[schema.ERROR_CLASS], pa.array(PASSING))).as_py()
    )


def write_shard(
    folder: str,
    batch: SampleBatch,
    tokens: list[NDArray[np.float32] | None],
    dtype: TokenDtype,
    states: Sequence[str | None],
) -> int:
    """Write one shard, and after it its list of rows.

    Args:
        folder: Of the cache.
        batch: The decoded rows; `batch.step` is the shard's number.
        tokens: [T, P, V] of each row, None where it failed.
        dtype: How to store them.
        states: `file_states` of the rows' media from before they were read.

    Returns:
        Bytes written.
    """
    name = storage.join(folder, _shard_name(batch.step))
    # A list of other rows would call the shard finished.
    with contextlib.suppress(FileNotFoundError):
        storage.remove_file(f"{name}.parquet")
    failures = {failure.sample_id: failure for failure in batch.failures}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SHARD_SCHEMA) as writer:
        columns = (batch.sample_ids, batch.image_ids.tolist(), tokens, batch.frame_valid.tolist())
        for sample_id, source, values, frame_valid in zip(*columns, strict=True):
            raw = None if values is None else encode_tokens(values, dtype)
            failure = failures.get(sample_id)
            row = {
                schema.SAMPLE_ID: sample_id,
                _SOURCE: source,
                "shape": None if raw is None else list(raw.shape),
                "tokens": None if raw is None else raw.tobytes(),
                "frame_valid": frame_valid,
                **{column: failure and getattr(failure, column) for column in _FAILURE_COLUMNS},
            }
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=_SHARD_SCHEMA))
    content = sink.getvalue()
    storage.write_bytes(f"{name}.arrow", content)
    count = len(batch.sample_ids)
    of_rows = [failures.get(sample_id) for sample_id in batch.sample_ids]
    reasons = (schema.ERROR_CLASS, schema.MEDIA, schema.STAGE, schema.MESSAGE, schema.TRIES)
    rows = pa.table(
        {
            schema.SAMPLE_ID: batch.sample_ids,
            _SOURCE: batch.image_ids,
            schema.FEATURE_SHARD: [batch.step] * count,
            schema.FEATURE_ROW: list(range(count)),
            STATE: states,
            **{column: [failure and getattr(failure, column) for failure in of_rows] for column in reasons},
        }
    )
    _write_table(rows.select(_ROWS_SCHEMA.names).cast(_ROWS_SCHEMA), f"{name}.parquet")
    return len(content)


def open_for_change(folder: str) -> None:
    """Make a cache unfinished, so that no training begins on it while shards are made anew."""
    if storage.exists(path := storage.join(folder, INDEX_FILE)):
        storage.remove_file(path)


def write_quarantine(folder: str, num_shards: int) -> pa.Table:
    """Join what the shards' lists say of failed rows, and return it; unfinished shards have none."""
    paths = [storage.join(folder, _rows_file(shard)) for shard in range(num_shards)]
    failures = []
    for rows in (_read_table(path) for path in paths if storage.exists(path)):
        failures += quarantine.from_table(rows.filter(pc.is_valid(rows[schema.ERROR_CLASS])))
    table = quarantine.to_table(failures)
    _write_table(table, storage.join(folder, QUARANTINE_FILE))
    return table


def write_index(folder: str, num_shards: int) -> pa.Table:
    """Join the shards' lists of rows: from here on the cache is finished. Returns the index."""
    paths = [storage.join(folder, _rows_file(shard)) for shard in range(num_shards)]
    tables = [_read_table(path).select(_INDEX_SCHEMA.names) for path in paths]
    index = pa.concat_tables(tables) if tables else _INDEX_SCHEMA.empty_table()
    _write_table(index, storage.join(folder, INDEX_FILE))
    return index


def locate(manifest: pa.Table, cache: FeatureCache) -> pa.Table:
    """Add to each manifest row where its features lie.

    Raises:
        UserError: If the cache lacks a row, or was made when the row meant another file or clip.
    """
    index = _read_table(storage.join(cache.folder, INDEX_FILE))
    places = pc.index_in(manifest[schema.SAMPLE_ID], value_set=index[schema.SAMPLE_ID])
    advice = f"run `qformer features --set output={cache.folder}` over this manifest; it encodes {_ENCODED}"
    if places.null_count:
        missing = manifest.filter(pc.is_null(places))[schema.SAMPLE_ID]
        raise UserError(
            f"feature cache {cache.folder} lacks {len(missing)} rows, {missing[0].as_py()!r} first; {advice}"
        )
    found = index.take(places)
    moved = np.flatnonzero(found[_SOURCE].to_numpy() != np.asarray(image_ids(manifest), dtype=np.int64))
    if len(moved):
        name = manifest[schema.SAMPLE_ID][int(moved[0])].as_py()
        raise UserError(
            f"feature cache {cache.folder} was made of other files for {len(moved)} rows, {name!r} first; {advice}"
        )
    for column in (schema.FEATURE_SHARD, schema.FEATURE_ROW):
        manifest = manifest.append_column(column, found[column])
    return manifest


class ReadFeatures:
    """Turns a block of located rows into `batch.pack`'s table; the cache's twin of `DecodeRows`.

    Args:
        cache: Where to read.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._spec, self._folder = cache.spec, cache.folder
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(functools.partial(_open_shard, cache.folder))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Read a block; rows whose decoding failed come back with their failure and zero tokens."""
        images = ImageRows([self._spec.raw_shape(kind) for kind in rows[schema.KIND].to_pylist()], self._spec.dtype)
        failures: list[Failure | None] = []
        costs = [StageCosts() for _ in range(len(rows))]
        names = (schema.SAMPLE_ID, schema.MEDIA, IMAGE_ID, *schema.FEATURE_COLUMNS)
        columns = [rows[name].to_pylist() for name in names]
        for row, (name, media, source, shard, place) in enumerate(zip(*columns, strict=True)):
            failure = None
            if name:
                with costs[row].measure("fetch"):
                    stored = self._stored(name, source, shard, place)
                if stored[schema.STAGE][0].is_valid:
                    failure = Failure(name, media, *(stored[column][0].as_py() for column in _FAILURE_COLUMNS))
                else:
                    values = np.frombuffer(stored["tokens"][0].as_buffer(), dtype=RAW_DTYPES[self._spec.dtype])
                    with costs[row].measure("fetch"):  # a mapped file is read when its bytes are touched
                        images[row] = values.reshape(stored["shape"][0].as_py())
                    images.frame_valid[row] = stored["frame_valid"][0].as_py()
                    costs[row].fetched_bytes = values.nbytes
            failures.append(failure)
        return pack(rows, images, failures, costs)

    def _stored(self, name: str, source: int, shard: int, place: int) -> pa.RecordBatch:
        """The record batch of a row.

        Raises:
            UserError: If it is not there, or of another row: the cache was changed since the training began.
        """
        told = f"feature cache {self._folder}, shard {shard}, row {place}"
        advice = (
            "the cache was changed or damaged; stop what writes into it, run `qformer features "
            f"--set output={self._folder}` over this manifest, and resume"
        )
        try:
            stored = self._shard(shard).get_batch(place)
        except (FileNotFoundError, ValueError, IndexError) as error:
            raise UserError(f"{told}: sample {name!r} is not there ({str(error)[:100]}); {advice}") from error
        # The rows of a mixture have their source's name in front.
        own = stored[schema.SAMPLE_ID][0].as_py()
        if stored[_SOURCE][0].as_py() != source or not (name == own or name.endswith(f"/{own}")):
            raise UserError(f"{told} is {own!r} of other media, not sample {name!r}; {advice}")
        return stored


def _open_shard(folder: str, shard: int) -> Any:
    path = storage.join(folder, f"{_shard_name(shard)}.arrow")
    source = pa.memory_map(storage.local_path(path)) if storage.is_local(path) else storage.open_input(path)
    return pa.ipc.open_file(source)


def _shard_name(shard: int) -> str:
    return f"shard-{shard:08d}"


def _rows_file(shard: int) -> str:
    return f"{_shard_name(shard)}.parquet"


def _read_table(path: str) -> pa.Table:
    with storage.open_input(path) as file:
        return pq.read_table(file)


def _write_table(table: pa.Table, path: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(path, sink.getvalue())


_ENCODED = "only the shards whose rows changed or moved"
_FAILURE_COLUMNS = (schema.STAGE, schema.ERROR_CLASS, schema.MESSAGE, schema.TRIES)
