"""Preparation of a corpus: usable and quarantined rows are collected on disk, then written as the job's files."""

import itertools
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data import schema, storage
from pipelines.data.corpus import quarantine
from pipelines.data.corpus.duplicates import find_duplicates, is_leak
from pipelines.data.corpus.manifest_files import append_rows, iterate_rows, write_manifest
from pipelines.data.corpus.quarantine import QUARANTINE_FILE
from pipelines.data.corpus.summary import CorpusSummary
from pipelines.data.corpus.temporary_table import TemporaryTable
from pipelines.data.failures import Failure

QUARANTINED_ROWS_FILE = "quarantined_rows.parquet"
"""Manifest rows of failed files, for another try."""
PROBE_FILE = "probe.parquet"
DUPLICATES_FILE = "duplicates.parquet"
_USED_SCHEMA = pa.schema([*schema.MANIFEST_SCHEMA, *schema.FACTS_SCHEMA])
_COUNTED = [schema.KIND, schema.SPLIT, schema.SOURCE, schema.CAPTIONS]


class Preparation:
    """Collects checked rows on disk; `write` or `append` makes files of them."""

    def __init__(self) -> None:
        self._used, self._failed = TemporaryTable(_USED_SCHEMA), TemporaryTable(schema.MANIFEST_SCHEMA)
        self._quarantine = TemporaryTable(schema.QUARANTINE_SCHEMA)

    @property
    def num_rows(self) -> int:
        """Number of collected rows, usable and quarantined."""
        return self._used.num_rows + self._quarantine.num_rows

    @property
    def num_quarantined(self) -> int:
        """Number of rows that cannot be used."""
        return self._quarantine.num_rows

    def add_failures(self, failures: Iterable[Failure]) -> None:
        """Add rows that failed before they became manifest rows."""
        self._quarantine.append(quarantine.to_table(failures))

    def add(self, rows: pa.Table, checked: pa.Table) -> None:
        """Add manifest rows, split into usable and failed ones by their results of `decode_rows.CheckRows`.

        Raises:
            UserError: If the storage cannot be read at all.
        """
        assert rows[schema.SAMPLE_ID].equals(checked[schema.SAMPLE_ID]), "results of other rows"
        is_used = pc.is_null(checked[schema.STAGE])
        used, facts = rows.filter(is_used), checked.filter(is_used)
        for field in schema.FACTS_SCHEMA:
            used = used.append_column(field, facts[field.name])
        self._used.append(used)
        failed = rows.filter(pc.invert(is_used))
        if len(failed):
            self._failed.append(failed)
            columns = (schema.STAGE, schema.ERROR_CLASS, schema.MESSAGE, schema.TRIES)
            reasons = checked.filter(pc.invert(is_used)).select(columns).to_pylist()
            names, media = failed[schema.SAMPLE_ID].to_pylist(), failed[schema.MEDIA].to_pylist()
            failures = [Failure(*key, **reason) for *key, reason in zip(names, media, reasons, strict=True)]
            quarantine.require_readable(failures)
            self.add_failures(failures)

    def write(self, output: str, *, drop_leaks: bool) -> pa.Table:
        """Write all files of a new corpus.

        Args:
            output: Folder.
            drop_leaks: Whether to quarantine training rows whose media is in evaluation, too.

        Returns:
            The duplicates, in `schema.DUPLICATES_SCHEMA`.
        """
        duplicates = find_duplicates(self._used.read)
        dropped = self._dropped(duplicates) if drop_leaks else {}
        self.add_failures(dropped.values())
        write_manifest(self._usable(schema.MANIFEST_SCHEMA.names, dropped), self._used.num_rows - len(dropped), output)
        _write(self._usable(schema.PROBE_SCHEMA.names, dropped), schema.PROBE_SCHEMA, output, PROBE_FILE)
        self._write_rest(duplicates, output)
        return duplicates

    def append(self, output: str, *, drop_leaks: bool) -> pa.Table:
        """Add the usable rows to the corpus in `output`; the failed rows replace its quarantine.

        Rows that were usable before stay, also when a new row shows that they leak.

        Returns:
            The duplicates of old and new rows together.
        """
        old = storage.join(output, PROBE_FILE)

        def read(columns: list[str]) -> Iterator[pa.Table]:
            yield from _read(old, columns)
            yield from self._used.read(columns)

        duplicates = find_duplicates(read)
        dropped = self._dropped(duplicates) if drop_leaks else {}
        self.add_failures(dropped.values())
        rows = pa.concat_tables(
            [schema.MANIFEST_SCHEMA.empty_table(), *self._usable(schema.MANIFEST_SCHEMA.names, dropped)]
        )
        facts = pa.concat_tables([schema.PROBE_SCHEMA.empty_table(), *self._usable(schema.PROBE_SCHEMA.names, dropped)])
        # An earlier run that was killed here may have added them already.
        rows = _without(rows, iterate_rows(output, [schema.SAMPLE_ID]))
        facts = _without(facts, _read(old, [schema.SAMPLE_ID]))
        if len(rows):
            append_rows(rows, output)
        if len(facts):
            fresh = f"{PROBE_FILE}.new"
            _write(itertools.chain(_read(old), [facts]), schema.PROBE_SCHEMA, output, fresh)
            storage.move_file(storage.join(output, fresh), old)
        self._write_rest(duplicates, output)
        return duplicates

    def close(self) -> None:
        """Delete the temporary files."""
        for table in (self._used, self._failed, self._quarantine):
            table.close()

    def _dropped(self, duplicates: pa.Table) -> dict[str, Failure]:
        leaks = duplicates.filter(pa.array(is_leak(duplicates), pa.bool_()))
        ours = _found(leaks[schema.SAMPLE_ID], self._used.read([schema.SAMPLE_ID]))
        failures = {}
        for row in leaks.to_pylist():
            name, other, split = (
                row[key] for key in (schema.SAMPLE_ID, schema.DUPLICATE_OF, schema.DUPLICATE_OF_SPLIT)
            )
            if name in ours:
                message = f"the same bytes as sample {other!r} of split {split!r}"
                failures[name] = Failure(name, row[schema.MEDIA], "manifest", "config", message)
        return failures

    def _usable(self, columns: list[str], dropped: dict[str, Failure]) -> Iterator[pa.Table]:
        wanted = columns if schema.SAMPLE_ID in columns else [*columns, schema.SAMPLE_ID]
        names = pa.array(list(dropped), pa.string())
        for block in self._used.read(wanted):
            yield block.filter(pc.invert(pc.is_in(block[schema.SAMPLE_ID], names))).select(columns)

    def _write_rest(self, duplicates: pa.Table, output: str) -> None:
        _write([duplicates], schema.DUPLICATES_SCHEMA, output, DUPLICATES_FILE)
        _write(self._failed.read(), schema.MANIFEST_SCHEMA, output, QUARANTINED_ROWS_FILE)
        _write(self._quarantine.read(), schema.QUARANTINE_SCHEMA, output, QUARANTINE_FILE)


def count_corpus(output: str) -> CorpusSummary:
    """Count the rows, captions and files of a written corpus."""
    summary = CorpusSummary()
    for block in iterate_rows(output, _COUNTED):
        summary.add_rows(block)
    for block in _read(storage.join(output, PROBE_FILE)):
        summary.add_facts(block)
    for block in _read(storage.join(output, QUARANTINE_FILE)):
        summary.add_quarantined(block)
    return summary


def quarantined_rows(output: str) -> Iterator[tuple[pa.Table, list[int]]]:
    """Yield the manifest rows of a written corpus' quarantined files, with the number of tries of each."""
    tries = {
        row[schema.SAMPLE_ID]: row[schema.TRIES]
        for block in _read(storage.join(output, QUARANTINE_FILE))
        for row in block.to_pylist()
    }
    for block in _read(storage.join(output, QUARANTINED_ROWS_FILE)):
        yield block, [tries[name] for name in block[schema.SAMPLE_ID].to_pylist()]


def failures_before_reading(output: str) -> list[Failure]:
    """Failures of a written corpus from before any file was read; only a change of the source can fix them."""
    failures: list[Failure] = []
    for block in _read(storage.join(output, QUARANTINE_FILE)):
        names = block[schema.SAMPLE_ID]
        # A run that was killed while it moved rows may have left them in more than one table.
        elsewhere = _found(names, _read(storage.join(output, QUARANTINED_ROWS_FILE), [schema.SAMPLE_ID]))
        elsewhere |= _found(names, iterate_rows(output, [schema.SAMPLE_ID]))
        failures += [failure for failure in quarantine.from_table(block) if failure.sample_id not in elsewhere]
    return failures


def add_tries(checked: pa.Table, tries: list[int]) -> pa.Table:
    """Add earlier tries to those of a `CheckRows` table."""
    column = checked.column_names.index(schema.TRIES)
    return checked.set_column(column, schema.TRIES, pc.add(checked[schema.TRIES], pa.array(tries, pa.int32())))


def _without(rows: pa.Table, others: Iterable[pa.Table]) -> pa.Table:
    """Rows whose sample ids are not among the others'."""
    found = pa.array(sorted(_found(rows[schema.SAMPLE_ID], others)), pa.string())
    return rows.filter(pc.invert(pc.is_in(rows[schema.SAMPLE_ID], found)))


def _found(names: pa.ChunkedArray, blocks: Iterable[pa.Table]) -> set[str]:
    """The names that occur in the blocks."""
    wanted, found = pa.array(names.to_pylist(), pa.string()), set[str]()
    for block in blocks if len(wanted) else ():
        there = block[schema.SAMPLE_ID]
        found.update(there.filter(pc.is_in(there, wanted)).to_pylist())
    return found


def _write(blocks: Iterable[pa.Table], table_schema: pa.Schema, output: str, name: str) -> None:
    with (
        storage.open_output(storage.join(output, name)) as file,
        pq.ParquetWriter(file, table_schema, compression="zstd") as writer,
    ):
        for block in blocks:
            if len(block):
                writer.write_table(block.cast(table_schema))


def _read(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    with storage.open_regular(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=columns):
            yield pa.Table.from_batches([batch]) if columns is None else pa.Table.from_batches([batch]).select(columns)
