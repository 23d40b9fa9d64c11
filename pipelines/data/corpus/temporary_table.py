"""A temporary table on disk."""

import tempfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

_ROW_GROUP_ROWS = 4096


class TemporaryTable:
    """Rows in a temporary file, written once and read any number of times. The file ends with the process.

    Args:
        schema: Schema of the rows.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._schema = schema
        # The file has no name, so a killed process leaves nothing behind.
        self._file = tempfile.TemporaryFile(prefix="qformer-rows-")  # noqa: SIM115
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(self._file, schema)

    def append(self, rows: pa.Table) -> None:
        """Add rows; not allowed after the first read."""
        assert self._writer is not None, "the table was read already"
        if len(rows):
            self._writer.write_table(rows.select(self._schema.names).cast(self._schema), _ROW_GROUP_ROWS)
        self.num_rows += len(rows)

    def read(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows in order, in chunks.

        Args:
            columns: Columns to read; None for all.
        """
        self._finish()
        self._file.seek(0)
        names = list(columns) if columns is not None else self._schema.names
        for batch in pq.ParquetFile(self._file).iter_batches(batch_size=_ROW_GROUP_ROWS, columns=names):
            yield pa.Table.from_batches([batch]).select(names)

    def close(self) -> None:
        """Delete the file."""
        self._finish()
        self._file.close()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.flush()
            self._writer = None
