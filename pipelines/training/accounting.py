"""Which rows a run used and which it quarantined: rows in = rows used + rows quarantined, for the surviving steps."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import distributed

from pipelines.data.batch import Failure, SampleBatch
from pipelines.data.quarantine import accounting_line
from qformer.distributed import world_size
from qformer.errors import UserError


@dataclass(slots=True)
class Accounting:
    """Counts row visits on this rank and, after `combine`, over all ranks.

    A row is visited once an epoch; more often only where a mixture's weights draw its source more than once.
    """

    rows_in: int = 0
    rows_used: int = 0
    rows_quarantined: int = 0
    quarantined: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Failures of all ranks so far, keyed by epoch and sample id: a row that fails at two visits of an epoch is one
    entry, and counts twice in `rows_quarantined`."""
    _fresh: list[tuple[int, Failure]] = field(default_factory=list)
    _fresh_in: int = 0
    _fresh_used: int = 0

    def add(self, batch: SampleBatch, epoch: int) -> None:
        """Count one batch of this rank."""
        self._fresh_in += sum(1 for sample_id in batch.sample_ids if sample_id)
        self._fresh_used += int(batch.is_valid.sum())
        self._fresh.extend((epoch, failure) for failure in batch.failures)

    def combine(self) -> None:
        """Bring all ranks' counts together; every rank must call it at the same step."""
        parts: list[Any] = [(self._fresh_in, self._fresh_used, self._fresh)]
        if world_size() > 1:
            own, parts = parts[0], [None] * world_size()
            distributed.all_gather_object(parts, own)
        for rows_in, rows_used, failures in parts:
            self.rows_in += rows_in
            self.rows_used += rows_used
            self.rows_quarantined += len(failures)
            for epoch, failure in failures:
                self.quarantined[f"{epoch}/{failure.sample_id}"] = {"epoch": epoch, **dataclasses.asdict(failure)}
        self._fresh, self._fresh_in, self._fresh_used = [], 0, 0

    def check(self, *, epoch: int, rows_per_epoch: int, max_share: float) -> None:
        """Stop a run whose data is going bad.

        Raises:
            UserError: If more than `max_share` of the epoch's rows are quarantined already.
        """
        count = sum(1 for failure in self.quarantined.values() if failure["epoch"] == epoch)
        if count > max_share * rows_per_epoch:
            reasons = sorted({failure["error_class"] for failure in self.quarantined.values()})
            raise UserError(
                f"{count} of {rows_per_epoch} rows of epoch {epoch} are quarantined ({', '.join(reasons)}), more than "
                f"max_quarantine_share={max_share:g}; see quarantine.parquet, run `qformer prepare`, or raise the share"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        counts = {"rows_in": self.rows_in, "rows_used": self.rows_used, "rows_quarantined": self.rows_quarantined}
        return {**counts, "quarantined": self.quarantined}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Accounting":
        """Inverse of `state`."""
        return cls(**{**state, "quarantined": dict(state["quarantined"])})

    @property
    def line(self) -> str:
        """The accounting line of the combined counts."""
        return accounting_line(self.rows_in, self.rows_used, self.rows_quarantined)
