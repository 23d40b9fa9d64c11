"""Results of a model on decoded rows: every row once, with a result or a failure."""

import logging
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import schema
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.corpus.quarantine import require_readable
from pipelines.data.failures import Failure

logger = logging.getLogger(__name__)

_FAILURE_COLUMNS = (schema.MEDIA, schema.STAGE, schema.ERROR_CLASS, schema.MESSAGE, schema.TRIES)


def result_table(batch: SampleBatch, results: Mapping[str, pa.Array]) -> pa.Table:
    """Join a model's results with the failures of the rows that could not be decoded.

    Args:
        batch: Input of the model.
        results: Arrays by column name, with one entry for each valid row of `batch`, in order.

    Returns:
        A table with all rows of `batch` except padding: results where valid, failure columns elsewhere.
    """
    used = [name for name, valid in zip(batch.sample_ids, batch.is_valid, strict=True) if valid]
    good = pa.table({schema.SAMPLE_ID: pa.array(used, pa.string()), **results})
    bad = pa.table(
        {
            schema.SAMPLE_ID: pa.array([failure.sample_id for failure in batch.failures], pa.string()),
            **{name: [getattr(failure, name) for failure in batch.failures] for name in _FAILURE_COLUMNS},
        }
    )
    return pa.concat_tables([good, bad], promote_options="permissive")


def collect(tables: Iterable[pa.Table], num_rows: int) -> tuple[pa.Table, list[Failure]]:
    """Split tables into results and failures, and check that no row is missing.

    Args:
        tables: Outputs of `result_table`.
        num_rows: Expected number of rows.

    Returns:
        The rows with results (sample_id and the model's columns), and the failures of all others.

    Raises:
        UserError: If storage denies access.
    """
    results: list[pa.Table] = []
    failures: list[Failure] = []
    num_done = 0
    for table in tables:
        is_bad = pc.is_valid(table[schema.ERROR_CLASS])
        bad = table.filter(is_bad).select([schema.SAMPLE_ID, *_FAILURE_COLUMNS])
        failures += [Failure(**row) for row in bad.to_pylist()]
        require_readable(failures)
        results.append(table.filter(pc.invert(is_bad)).drop_columns(list(_FAILURE_COLUMNS)))
        num_done += table.num_rows
        logger.info("evaluated %d of %d rows", num_done, num_rows)
    assert num_done == num_rows, f"{num_rows} rows went in but {num_done} came out"
    return pa.concat_tables(results, promote_options="permissive"), failures
