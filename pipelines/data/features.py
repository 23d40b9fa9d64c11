"""The feature cache: what the frozen encoder sees, computed once and stored beside the corpus.

CACHE/
    features.json            what made it (`FeatureSpec`), and its fingerprint
    shard-00000000.arrow     Arrow IPC, one record batch a row, so that any row is one read away
    shard-00000000.parquet   which rows the shard holds; written after it, so a shard without it is unfinished
    index.parquet            all shards' rows; written last

A shard is a block of consecutive manifest rows of one kind; its bytes follow from manifest and spec alone. Rows that
cannot be decoded keep their place, with the reason, so that training on the cache quarantines what pixels would have.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data import schema, storage
from pipelines.data.batch import Failure, ImageRows, SampleBatch, pack
from pipelines.data.feature_spec import FeatureSpec, read_spec
from pipelines.data.plan import evaluation_blocks, image_ids
from pipelines.data.row_index import TableRows
from pipelines.data.samples import DecodeSettings
from pipelines.data.stage_costs import StageCosts
from pipelines.data.token_codec import RAW_DTYPES, TokenDtype, encode_tokens
from qformer.errors import UserError

INDEX_FILE = "index.parquet"
_SOURCE = "source"
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
_SHARD_SCHEMA = pa.schema(
    [
        (schema.SAMPLE_ID, pa.string()),
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


def finished_shard(folder: str, shard: int, rows: pa.Table) -> bool:
    """Whether `shard` is there with exactly these rows."""
    path = storage.join(folder, f"{_shard_name(shard)}.parquet")
    if not storage.exists(path):
        return False
    found = _read_table(path)
    return bool(
        found[schema.SAMPLE_ID].to_pylist() == rows[schema.SAMPLE_ID].to_pylist()
        and found[_SOURCE].to_pylist() == image_ids(rows)
    )


def write_shard(folder: str, batch: SampleBatch, tokens: list[NDArray[np.float32] | None], dtype: TokenDtype) -> int:
    """Write one shard, and after it its list of rows.

    Args:
        folder: Of the cache.
        batch: The decoded rows; `batch.step` is the shard's number.
        tokens: [T, P, V] of each row, None where it failed.
        dtype: How to store them.

    Returns:
        Bytes written.
    """
    failures = {failure.sample_id: failure for failure in batch.failures}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SHARD_SCHEMA) as writer:
        for name, values, frame_valid in zip(batch.sample_ids, tokens, batch.frame_valid.tolist(), strict=True):
            raw = None if values is None else encode_tokens(values, dtype)
            failure = failures.get(name)
            row = {
                schema.SAMPLE_ID: name,
                "shape": None if raw is None else list(raw.shape),
                "tokens": None if raw is None else raw.tobytes(),
                "frame_valid": frame_valid,
                **{column: failure and getattr(failure, column) for column in _FAILURE_COLUMNS},
            }
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=_SHARD_SCHEMA))
    content = sink.getvalue()
    name = _shard_name(batch.step)
    storage.write_bytes(storage.join(folder, f"{name}.arrow"), content)
    count = len(batch.sample_ids)
    rows = pa.table(
        {
            schema.SAMPLE_ID: batch.sample_ids,
            _SOURCE: batch.image_ids,
            schema.FEATURE_SHARD: [batch.step] * count,
            schema.FEATURE_ROW: list(range(count)),
            schema.ERROR_CLASS: [failures[n].error_class if n in failures else None for n in batch.sample_ids],
        },
        schema=_INDEX_SCHEMA,
    )
    _write_table(rows, storage.join(folder, f"{name}.parquet"))
    return len(content)


def write_index(folder: str, num_shards: int) -> pa.Table:
    """Join the shards' lists of rows: from here on the cache is finished. Returns the index."""
    paths = [storage.join(folder, f"{_shard_name(shard)}.parquet") for shard in range(num_shards)]
    index = pa.concat_tables([_read_table(path) for path in paths]) if paths else _INDEX_SCHEMA.empty_table()
    _write_table(index, storage.join(folder, INDEX_FILE))
    return index


def locate(manifest: pa.Table, cache: FeatureCache) -> pa.Table:
    """Add to each manifest row where its features lie.

    Raises:
        UserError: If the cache lacks a row, or was made when the row meant another file or clip.
    """
    index = _read_table(storage.join(cache.folder, INDEX_FILE))
    places = pc.index_in(manifest[schema.SAMPLE_ID], value_set=index[schema.SAMPLE_ID])
    advice = f"run `qformer features --set output={cache.folder}` over this manifest; it encodes only what is new"
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
        self._spec = cache.spec
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(functools.partial(_open_shard, cache.folder))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Read a block; rows whose decoding failed come back with their failure and zero tokens."""
        images = ImageRows([self._spec.raw_shape(kind) for kind in rows[schema.KIND].to_pylist()], self._spec.dtype)
        failures: list[Failure | None] = []
        costs = [StageCosts() for _ in range(len(rows))]
        columns = [rows[name].to_pylist() for name in (schema.SAMPLE_ID, schema.MEDIA, *schema.FEATURE_COLUMNS)]
        for row, (name, media, shard, place) in enumerate(zip(*columns, strict=True)):
            failure = None
            if name:
                with costs[row].measure("fetch"):
                    stored = self._shard(shard).get_batch(place)
                # The rows of a mixture have their source's name in front.
                own = stored[schema.SAMPLE_ID][0].as_py()
                assert name == own or name.endswith(f"/{own}"), f"shard {shard} row {place} is not {name!r}"
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


def _open_shard(folder: str, shard: int) -> Any:
    path = storage.join(folder, f"{_shard_name(shard)}.arrow")
    source = pa.memory_map(storage.local_path(path)) if storage.is_local(path) else storage.open_input(path)
    return pa.ipc.open_file(source)


def _shard_name(shard: int) -> str:
    return f"shard-{shard:08d}"


def _read_table(path: str) -> pa.Table:
    with storage.open_input(path) as file:
        return pq.read_table(file)


def _write_table(table: pa.Table, path: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(path, sink.getvalue())


_FAILURE_COLUMNS = (schema.STAGE, schema.ERROR_CLASS, schema.MESSAGE, schema.TRIES)
