"""The files of a feature cache: names, columns, reading and writing.

CACHE/
    features.json            its `FeatureSpec` and fingerprint
    shard-00000000.arrow     Arrow IPC, one record batch a row, so that any row takes one read
    shard-00000000.parquet   the rows of the shard; written after it, so a shard without it is unfinished
    index.parquet            all shards' rows; written last, and removed before a finished cache is changed
    quarantine.parquet       rows without features, and the reasons

A shard is a block of consecutive manifest rows of one kind; its bytes depend on manifest and spec alone. Rows that
cannot be decoded keep their place, with the reason, so that training on the cache quarantines the same rows as on
pixels. If another try may succeed (`shards.RETRYABLE_ERRORS`), the next run of the job writes the shard again.

A row is identified by its id, its media and its clip bounds, and a local file also by its size and modification time: a
replaced local file is encoded again when the job runs again. A remote file that was replaced under the same name is not
noticed, because a request for every file may take hours; give it another name.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import schema, storage
from pipelines.data.storage.retries import with_retries

INDEX_FILE = "index.parquet"
SOURCE, STATE = "source", "state"
FAILURE_COLUMNS = (schema.STAGE, schema.ERROR_CLASS, schema.MESSAGE, schema.TRIES)
INDEX_SCHEMA = pa.schema(
    [
        (schema.SAMPLE_ID, pa.string()),
        (SOURCE, pa.int64()),
        (schema.FEATURE_SHARD, pa.int32()),
        (schema.FEATURE_ROW, pa.int32()),
        (schema.ERROR_CLASS, pa.string()),
    ]
)
ROWS_SCHEMA = pa.schema(
    [
        *INDEX_SCHEMA,
        (STATE, pa.string()),
        (schema.MEDIA, pa.string()),
        (schema.STAGE, pa.string()),
        (schema.MESSAGE, pa.string()),
        (schema.TRIES, pa.int32()),
    ]
)
"""Schema of a shard's list of rows; the columns from media on are set only for failed rows."""
SHARD_SCHEMA = pa.schema(
    [
        (schema.SAMPLE_ID, pa.string()),
        (SOURCE, pa.int64()),
        ("shape", pa.list_(pa.int32())),
        ("tokens", pa.large_binary()),
        ("frame_valid", pa.list_(pa.bool_())),
        (schema.STAGE, pa.string()),
        (schema.ERROR_CLASS, pa.string()),
        (schema.MESSAGE, pa.string()),
        (schema.TRIES, pa.int32()),
    ]
)


AUDIO, AUDIO_VALID = "audio", "audio_valid"
AUDIO_SHARD_SCHEMA = pa.schema([*SHARD_SCHEMA, (AUDIO, pa.large_binary()), (AUDIO_VALID, pa.list_(pa.bool_()))])
"""Schema of a cache with sound: the concatenated vectors of a row's valid segments, and the mask of valid ones."""


def open_shard(folder: str, shard: int) -> Any:
    """Open an Arrow file of one record batch a row; a local file is memory-mapped."""
    path = storage.join(folder, f"{shard_name(shard)}.arrow")
    source = pa.memory_map(storage.local_path(path)) if storage.is_local(path) else storage.open_input(path)
    return pa.ipc.open_file(source)


def shard_name(shard: int) -> str:
    """Name of a shard's files without their extensions."""
    return f"shard-{shard:08d}"


def rows_file(shard: int) -> str:
    """Name of a shard's list of rows."""
    return f"{shard_name(shard)}.parquet"


def read_table(path: str) -> pa.Table:
    """Read a Parquet file."""
    with storage.open_input(path) as file:
        return pq.read_table(file)


def write_table(table: pa.Table, path: str) -> None:
    """Write a Parquet file at once."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(path, sink.getvalue())


def write_file(path: str, content: pa.Buffer) -> None:
    """Write a file at once; remote stores are retried after transient failures.

    Raises:
        OSError: If a local disk cannot be written.
        MediaError: If a remote store cannot be written.
    """
    if storage.is_local(path):
        storage.write_bytes(path, content)
    else:
        with_retries(path, lambda: storage.write_bytes(path, content))
