"""The quarantine table: which rows cannot be used, why, at which stage, and after how many tries."""

from collections.abc import Iterable

import pyarrow as pa

from pipelines.data import schema
from pipelines.data.failures import Failure
from qformer.errors import UserError

QUARANTINE_FILE = "quarantine.parquet"
"""Name of the table in an output folder."""


def to_table(failures: Iterable[Failure], epoch: int = 0) -> pa.Table:
    """Make quarantine rows.

    Args:
        failures: Failed samples.
        epoch: 0-based epoch of the failures.
    """
    rows = [
        {
            schema.SAMPLE_ID: failure.sample_id,
            schema.MEDIA: failure.media,
            schema.STAGE: failure.stage,
            schema.ERROR_CLASS: failure.error_class,
            schema.MESSAGE: failure.message,
            schema.TRIES: failure.tries,
            schema.EPOCH: epoch,
        }
        for failure in failures
    ]
    return pa.Table.from_pylist(rows, schema=schema.QUARANTINE_SCHEMA)


def from_table(table: pa.Table) -> list[Failure]:
    """Rebuild failures from quarantine rows; the epoch is left out."""
    columns = (schema.SAMPLE_ID, schema.MEDIA, schema.STAGE, schema.ERROR_CLASS, schema.MESSAGE, schema.TRIES)
    return [Failure(*(row[name] for name in columns)) for row in table.to_pylist()]


def require_readable(failures: Iterable[Failure]) -> None:
    """Stop the run if the storage refuses access: a wrong permission or setting, which affects every row.

    Rows that are wrong themselves (class "config" at another stage) do not stop it.

    Raises:
        UserError: If a failure has class "config" at stage "read"; the message says what to change.
    """
    for failure in failures:
        if failure.error_class == "config" and failure.stage == "read":
            raise UserError(f"sample {failure.sample_id!r} cannot be read: {failure.message}")


def accounting_line(rows_in: int, used: int, quarantined: int) -> str:
    """One line that states that no row was lost.

    Raises:
        AssertionError: If a row was lost.
    """
    assert rows_in == used + quarantined, f"rows were lost: {rows_in} in, {used} used, {quarantined} quarantined"
    return f"rows in {rows_in} = rows used {used} + rows quarantined {quarantined}"
