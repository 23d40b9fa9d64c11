"""The files of a feature cache: names, columns, and how they are read and written.

CACHE/
    features.json            what made it (`FeatureSpec`), and its fingerprint
    shard-00000000.arrow     Arrow IPC, one record batch a row, so that any row is one read away
    shard-00000000.parquet   which rows the shard holds; written after it, so a shard without it is unfinished
    index.parquet            all shards' rows; written last, and removed before a finished cache is changed
    quarantine.parquet       rows without features, and why

A shard is a block of consecutive manifest rows of one kind; its bytes follow from manifest and spec alone. Rows that
cannot be decoded keep their place, with the reason, so that training on the cache quarantines what pixels would have.
Where the reason may pass (`RETRYABLE_ERRORS`), the next run of the job makes the shard anew.

A row is known by its id, its media and its clip bounds, and a local file also by its size and time of change: one that
was replaced in place is encoded anew when the job runs again. A remote file that was replaced under its name goes
unnoticed, for asking a store about every file may take hours; give it another name.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import schema, storage
from pipelines.data.storage.retries import with_retries

INDEX_FILE, QUARANTINE_FILE = "index.parquet", "quarantine.parquet"
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
"""Of a shard's list of rows; media and what follows only of those that failed."""
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
"""Of a cache with sound: the vectors of a row's valid segments, one after the other, and which of all those are."""


def open_shard(folder: str, shard: int) -> Any:
    """An Arrow file of one record batch a row, mapped into memory where the disk is local."""
    path = storage.join(folder, f"{shard_name(shard)}.arrow")
    source = pa.memory_map(storage.local_path(path)) if storage.is_local(path) else storage.open_input(path)
    return pa.ipc.open_file(source)


def shard_name(shard: int) -> str:
    """Of a shard's files, without their endings."""
    return f"shard-{shard:08d}"


def rows_file(shard: int) -> str:
    """Of a shard's list of rows."""
    return f"{shard_name(shard)}.parquet"


def read_table(path: str) -> pa.Table:
    """Read a Parquet file."""
    with storage.open_input(path) as file:
        return pq.read_table(file)


def write_table(table: pa.Table, path: str) -> None:
    """Write a Parquet file in one piece."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(path, sink.getvalue())


def write_file(path: str, content: pa.Buffer) -> None:
    """Write a file in one piece; to a store again where it has trouble that may pass.

    Raises:
        OSError: If a local disk does not take it.
        MediaError: If a store does not.
    """
    if storage.is_local(path):
        storage.write_bytes(path, content)
    else:
        with_retries(path, lambda: storage.write_bytes(path, content))
