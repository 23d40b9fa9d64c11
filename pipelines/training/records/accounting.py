"""Accounting of a run's rows over the surviving steps: rows in = rows used + rows quarantined."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from torch import distributed

from pipelines.data import schema
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.corpus.quarantine import accounting_line
from pipelines.data.failures import Failure
from qformer.distributed import rank, world_size
from qformer.errors import UserError

_SIGMAS, _MIN_FAILURES = 3.0, 4
"""Margin above the allowed count at which a run stops early, so that a corpus just below the share passes."""


class TooManyQuarantinedError(UserError):
    """More rows are quarantined than the run allows; every rank raises it at the same step."""


@dataclass(slots=True)
class Accounting:
    """Counts row visits on this rank and, after `combine`, over all ranks.

    A row is visited once an epoch; more often only where a mixture's weights draw its source more than once.
    """

    rows_in: int = 0
    rows_used: int = 0
    rows_quarantined: int = 0
    quarantined: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Failures of all ranks so far, keyed by epoch and sample id; on the first rank alone, which writes them. A row
    that fails at two visits of an epoch is one entry, and counts twice in `rows_quarantined`."""
    reasons: set[str] = field(default_factory=set)
    """Error classes of the failures so far, on every rank."""
    _failed: dict[int, set[int]] = field(default_factory=dict)
    """Hashes of the failed sample ids by epoch, on every rank; the two newest epochs alone."""
    _own_failures: list[tuple[int, Failure]] = field(default_factory=list)
    """Epoch and failure of this rank's rows since the last `combine`."""
    _own_in: int = 0
    _own_used: int = 0

    def add(self, batch: SampleBatch, epoch: int) -> None:
        """Count one batch of this rank."""
        self._own_in += sum(1 for sample_id in batch.sample_ids if sample_id)
        self._own_used += int(batch.is_valid.sum())
        self._own_failures.extend((epoch, failure) for failure in batch.failures)

    def combine(self) -> None:
        """Add the new counts of all ranks; every rank must call it at the same step."""
        parts: list[Any] = [(self._own_in, self._own_used, self._own_failures)]
        if world_size() > 1:
            own, parts = parts[0], [None] * world_size()
            distributed.all_gather_object(parts, own)
        for rows_in, rows_used, failures in parts:
            self.rows_in += rows_in
            self.rows_used += rows_used
            self.rows_quarantined += len(failures)
            for epoch, failure in failures:
                self._add_failure(epoch, failure.sample_id, failure.error_class)
                if rank() == 0:
                    self.quarantined[f"{epoch}/{failure.sample_id}"] = {"epoch": epoch, **dataclasses.asdict(failure)}
        self._own_failures, self._own_in, self._own_used = [], 0, 0

    def check(self, *, epoch: int, rows_per_epoch: int, max_share: float) -> None:
        """Stop a run that quarantines too many rows.

        Args:
            epoch: Current epoch.
            rows_per_epoch: Rows of an epoch.
            max_share: Largest share of an epoch's rows that may be quarantined.

        Raises:
            TooManyQuarantinedError: If more than `max_share` of the epoch's rows are quarantined already, if the rows
                so far show that the epoch will exceed it, or if no row could be used.
        """
        count = len(self._failed.get(epoch, ()))
        expected = max_share * self.rows_in
        is_hopeless = self.rows_quarantined > expected + _SIGMAS * math.sqrt(expected) + _MIN_FAILURES
        nothing_used = self.rows_in > 0 and self.rows_used == 0
        if count > max_share * rows_per_epoch or is_hopeless or nothing_used:
            reasons = ", ".join(sorted(self.reasons))
            raise TooManyQuarantinedError(
                f"{count} of {rows_per_epoch} rows of epoch {epoch} are quarantined ({reasons}; "
                f"{self.line}), more than max_quarantine_share={max_share:g} allows; see quarantine.parquet in the run "
                "folder, run `qformer prepare`, or raise the share"
            )

    def table(self) -> pa.Table:
        """The quarantine table of the run, on the first rank."""
        names = schema.QUARANTINE_SCHEMA.names
        columns = {name: [values[name] for values in self.quarantined.values()] for name in names}
        return pa.table(columns, schema=schema.QUARANTINE_SCHEMA)

    def state(self) -> dict[str, Any]:
        """Counts and failures for the checkpoint, which the first rank writes."""
        counts = {"rows_in": self.rows_in, "rows_used": self.rows_used, "rows_quarantined": self.rows_quarantined}
        return {**counts, "quarantined": self.quarantined}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Accounting":
        """Restore an accounting from its `state`."""
        accounting = cls(**{**state, "quarantined": dict(state["quarantined"]) if rank() == 0 else {}})
        for values in state["quarantined"].values():
            accounting._add_failure(values["epoch"], values["sample_id"], values["error_class"])
        return accounting

    def _add_failure(self, epoch: int, sample_id: str, error_class: str) -> None:
        self.reasons.add(error_class)
        self._failed.setdefault(epoch, set()).add(hash(sample_id))
        for past_epoch in sorted(self._failed)[:-2]:
            del self._failed[past_epoch]

    @property
    def line(self) -> str:
        """The accounting line of the combined counts."""
        return accounting_line(self.rows_in, self.rows_used, self.rows_quarantined)
