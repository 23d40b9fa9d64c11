"""Writing of a feature cache: shards, each complete or missing, and then the index.

`files` describes the layout.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data import schema, storage
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.batches.plan import evaluation_blocks, image_ids
from pipelines.data.batches.token_codec import TokenDtype, encode_tokens
from pipelines.data.corpus import quarantine
from pipelines.data.failures import Failure
from pipelines.data.features.files import (
    AUDIO,
    AUDIO_SHARD_SCHEMA,
    AUDIO_VALID,
    FAILURE_COLUMNS,
    INDEX_FILE,
    INDEX_SCHEMA,
    ROWS_SCHEMA,
    SHARD_SCHEMA,
    SOURCE,
    STATE,
    read_table,
    rows_file,
    shard_name,
    write_file,
    write_table,
)
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.row_index import TableRows
from pipelines.data.storage import members

RETRYABLE_ERRORS = ("transient", "timeout")
"""Error classes for which another try may succeed."""
_SHARD_PIXEL_BYTES = 64 * 1024**2
"""Bytes of pixels behind one shard, which a decode actor sends to an encoder actor at a time."""
_MAX_SHARD_ROWS = 4096


def shard_blocks(manifest: pa.Table, decode: DecodeSettings, max_rows: int = _MAX_SHARD_ROWS) -> list[pa.Table]:
    """Split a manifest into the rows of each shard, as input of `DecodeRows`; equal for equal arguments."""
    largest = max(map(decode.row_bytes, pc.unique(manifest[schema.KIND]).to_pylist()), default=1)
    rows_per_shard = int(np.clip(_SHARD_PIXEL_BYTES // largest, 1, max_rows))
    return list(evaluation_blocks(TableRows(manifest), rows_per_shard))


def file_states(media: Iterable[str | None]) -> list[str | None]:
    """Size and modification time of local files (for a tar member: of its shard); None for all others."""
    state_of: dict[str, str | None] = {}
    states: list[str | None] = []
    for uri in media:
        member = None if uri is None else members.parse(uri)
        path = uri if member is None else member.shard
        if path is not None and path not in state_of:
            state_of[path] = None
            if storage.is_local(path):
                with contextlib.suppress(OSError, ValueError):  # the reader of the file reports the error
                    status = os.stat(storage.local_path(path))
                    state_of[path] = f"{status.st_size}/{status.st_mtime_ns}"
        states.append(None if path is None else state_of[path])
    return states


def is_shard_finished(folder: str, shard: int, rows: pa.Table) -> bool:
    """Whether a shard exists with exactly these rows, unchanged files, and no failure that another try may fix.

    Files that no longer exist count as unchanged: their features stay valid.

    Args:
        folder: Folder of the cache.
        shard: Number of the shard.
        rows: Rows of the shard from `shard_blocks`.
    """
    path = storage.join(folder, rows_file(shard))
    return storage.exists(path) and is_current(read_table(path), rows)


def is_current(found: pa.Table, rows: pa.Table) -> bool:
    """Whether the stored results of some rows are still valid; see `is_shard_finished`.

    Args:
        found: List of rows with the columns of `ROWS_SCHEMA` for rows, files and failures.
        rows: Rows of the shard from `shard_blocks`.
    """
    states = zip(found[STATE].to_pylist(), file_states(rows[schema.MEDIA].to_pylist()), strict=False)
    return bool(
        found[schema.SAMPLE_ID].to_pylist() == rows[schema.SAMPLE_ID].to_pylist()
        and found[SOURCE].to_pylist() == image_ids(rows)
        and all(now is None or now == then for then, now in states)
        and not pc.any(pc.is_in(found[schema.ERROR_CLASS], pa.array(RETRYABLE_ERRORS))).as_py()
    )


def write_shard(
    folder: str,
    batch: SampleBatch,
    tokens: list[NDArray[np.float32] | None],
    dtype: TokenDtype,
    states: Sequence[str | None],
    vectors: Sequence[NDArray[np.float32]] | None = None,
) -> int:
    """Write one shard, and after it its list of rows.

    Args:
        folder: Folder of the cache.
        batch: Decoded rows; `batch.step` is the shard's number.
        tokens: Tokens [T, P, V] of each row, None where it failed.
        dtype: Storage type.
        states: `file_states` of the rows' media, from before they were read.
        vectors: Vectors [valid, V] of each row's valid segments of sound; None: a cache without sound.

    Returns:
        Bytes written.
    """
    name = storage.join(folder, shard_name(batch.step))
    # An old list of rows would mark the shard as finished.
    with contextlib.suppress(FileNotFoundError):
        storage.remove_file(f"{name}.parquet")
    failures = {failure.sample_id: failure for failure in batch.failures}
    failure_of = [failures.get(sample_id) for sample_id in batch.sample_ids]
    content = _shard_content(batch, tokens, dtype, vectors, failure_of)
    write_file(f"{name}.arrow", content)
    write_table(_list_of_rows(batch, states, failure_of), f"{name}.parquet")
    return len(content)


def _shard_content(
    batch: SampleBatch,
    tokens: list[NDArray[np.float32] | None],
    dtype: TokenDtype,
    vectors: Sequence[NDArray[np.float32]] | None,
    failure_of: Sequence[Failure | None],
) -> pa.Buffer:
    """Make an Arrow file with a record batch for each row, so that single rows can be read."""
    sink = pa.BufferOutputStream()
    row_schema = SHARD_SCHEMA if vectors is None else AUDIO_SHARD_SCHEMA
    with pa.ipc.new_file(sink, row_schema) as writer:
        columns = (batch.sample_ids, batch.image_ids.tolist(), tokens, batch.frame_valid.tolist(), failure_of)
        for place, (sample_id, source, values, frame_valid, failure) in enumerate(zip(*columns, strict=True)):
            raw = None if values is None else encode_tokens(values, dtype)
            row = {
                schema.SAMPLE_ID: sample_id,
                SOURCE: source,
                "shape": None if raw is None else list(raw.shape),
                "tokens": None if raw is None else raw.tobytes(),
                "frame_valid": frame_valid,
                **{column: failure and getattr(failure, column) for column in FAILURE_COLUMNS},
            }
            if vectors is not None and batch.audio_valid is not None:
                row[AUDIO] = encode_tokens(vectors[place], dtype).tobytes()
                row[AUDIO_VALID] = batch.audio_valid[place].tolist()
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=row_schema))
    return sink.getvalue()


def _list_of_rows(batch: SampleBatch, states: Sequence[str | None], failure_of: Sequence[Failure | None]) -> pa.Table:
    """List the rows of a shard and their failures in `ROWS_SCHEMA`."""
    count = len(batch.sample_ids)
    reasons = (schema.ERROR_CLASS, schema.MEDIA, schema.STAGE, schema.MESSAGE, schema.TRIES)
    rows = pa.table(
        {
            schema.SAMPLE_ID: batch.sample_ids,
            SOURCE: batch.image_ids,
            schema.FEATURE_SHARD: [batch.step] * count,
            schema.FEATURE_ROW: list(range(count)),
            STATE: states,
            **{column: [failure and getattr(failure, column) for failure in failure_of] for column in reasons},
        }
    )
    return rows.select(ROWS_SCHEMA.names).cast(ROWS_SCHEMA)


def mark_unfinished(folder: str) -> None:
    """Mark a cache as unfinished, so that no training starts on it while shards are rewritten."""
    if storage.exists(path := storage.join(folder, INDEX_FILE)):
        storage.remove_file(path)


def write_quarantine(folder: str, num_shards: int) -> pa.Table:
    """Join the failed rows of the shards' lists and return them; unfinished shards have no list."""
    paths = [storage.join(folder, rows_file(shard)) for shard in range(num_shards)]
    failures = []
    for rows in (read_table(path) for path in paths if storage.exists(path)):
        failures += quarantine.from_table(rows.filter(pc.is_valid(rows[schema.ERROR_CLASS])))
    table = quarantine.to_table(failures)
    write_table(table, storage.join(folder, quarantine.QUARANTINE_FILE))
    return table


def write_index(folder: str, num_shards: int) -> pa.Table:
    """Join the shards' lists of rows, which finishes the cache; return the index."""
    paths = [storage.join(folder, rows_file(shard)) for shard in range(num_shards)]
    tables = [read_table(path).select(INDEX_SCHEMA.names) for path in paths]
    index = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
    write_table(index, storage.join(folder, INDEX_FILE))
    return index
