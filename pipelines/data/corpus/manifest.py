"""Reading of manifests: the output of `prepare`, or any table with its columns."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data import schema, storage
from pipelines.data.corpus.manifest_files import is_marked, manifest_files
from pipelines.data.corpus.name_set import NameSet
from pipelines.data.corpus.sources.raw import Source
from pipelines.data.corpus.sources.source import read_source
from qformer.errors import UserError


def read_manifest(
    path: str, split: str | None = None, needs_captions: bool = False, kind: str | None = None
) -> pa.Table:
    """Read a manifest, or the output folder of `prepare`, as a whole.

    Args:
        path: Output folder of `prepare`, or any source of `read_source` with the manifest's column names.
        split: Split of the rows to return; None returns all.
        needs_captions: Whether every row must have a caption.
        kind: Kind of the rows to return, "image" or "video"; None returns both.

    Returns:
        Rows in `schema.MANIFEST_SCHEMA`.

    Raises:
        UserError: If it cannot be read, a row of it is wrong, the split is empty, sample ids repeat, or captions are
            missing.
    """
    written = manifest_files(path)
    table = pa.concat_tables([_read_rows(file) for file in written or [path]])
    if split is not None:
        table = _one_split(table, split, path)
    if not len(table):
        raise UserError(f"{path} holds no rows; prepare it from sources that do")
    if kind is not None:
        table = table.filter(pc.equal(table[schema.KIND], kind))
        if not len(table):
            raise UserError(f"{path} holds no {kind}s in split {split!r}; change data.kind or data.split")
    _require_unique(table, path)
    if needs_captions:
        _require_captions(table, path)
    return table


def write_table(table: pa.Table, uri: str) -> None:
    """Write a Parquet file, atomically on local disks."""
    with storage.open_output(uri) as file:
        pq.write_table(table, file, compression="zstd")


def _read_rows(path: str) -> pa.Table:
    if not is_marked(path):
        return _read_strictly(path)
    with storage.open_regular(path) as file:
        table = pq.read_table(file)
    # Files of earlier versions have fewer columns.
    for field in schema.MANIFEST_SCHEMA:
        if field.name not in table.column_names:
            empty: list[Any] = [None if field.nullable else []] * len(table)
            table = table.append_column(field, pa.array(empty, field.type))
    return table.select(schema.MANIFEST_SCHEMA.names).cast(schema.MANIFEST_SCHEMA)


def _read_strictly(path: str) -> pa.Table:
    """Read a table that `prepare` has not checked; any wrong row is an error."""
    tables = [schema.MANIFEST_SCHEMA.empty_table()]
    for block in read_source(Source(path=path)):
        if block.failures:
            raise UserError(f"{block.failures[0].message}; correct it, or run `qformer prepare` on {path} first")
        tables.append(block.rows)
    return pa.concat_tables(tables)


def _one_split(table: pa.Table, split: str, path: str) -> pa.Table:
    rows = table.filter(pc.equal(table[schema.SPLIT], split))
    if not len(rows):
        splits = sorted(pc.unique(table[schema.SPLIT]).to_pylist())
        raise UserError(f"split {split!r} of {path} is empty; it has {', '.join(splits) or 'no rows'}")
    return rows


def _require_unique(table: pa.Table, path: str) -> None:
    names = table[schema.SAMPLE_ID].to_pylist()
    is_new = NameSet().add(names)
    if not is_new.all():
        twice = names[int((~is_new).argmax())]
        raise UserError(f"{path}: sample_id {twice!r} occurs more than once; run `qformer prepare` on it first")


def _require_captions(table: pa.Table, path: str) -> None:
    missing = pc.indices_nonzero(pc.equal(pc.list_value_length(table[schema.CAPTIONS]), 0))
    if len(missing):
        first = table[schema.SAMPLE_ID][missing[0].as_py()].as_py()
        raise UserError(
            f"{path}: {len(missing)} of {len(table)} rows have no caption (the first is sample {first!r}); "
            f"add a column {schema.CAPTIONS!r}, or choose the rows that have some with data.split or data.kind"
        )
