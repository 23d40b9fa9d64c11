"""Rows set aside on disk until it is known what becomes of them."""

import tempfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

_ROW_GROUP_ROWS = 4096


class TemporaryTable:
    """A temporary file of rows, written once and read as often as wanted. Nothing of it outlives the process.

    Args:
        schema: Of the rows.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._schema = schema
        # It has no name any more: also a killed process leaves nothing behind.
        self._file = tempfile.TemporaryFile(prefix="qformer-spool-")  # noqa: SIM115
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(self._file, schema)

    def append(self, rows: pa.Table) -> None:
        """Add rows; not after the first reading."""
        assert self._writer is not None, "the spool is read already"
        if len(rows):
            self._writer.write_table(rows.select(self._schema.names).cast(self._schema), _ROW_GROUP_ROWS)
        self.num_rows += len(rows)

    def read(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows in order, a piece at a time.

        Args:
            columns: Only these; None for all.
        """
        self._finish()
        self._file.seek(0)
        names = list(columns) if columns is not None else self._schema.names
        for batch in pq.ParquetFile(self._file).iter_batches(batch_size=_ROW_GROUP_ROWS, columns=names):
            yield pa.Table.from_batches([batch]).select(names)

    def close(self) -> None:
        """Free the disk."""
        self._finish()
        self._file.close()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.flush()
            self._writer = None
