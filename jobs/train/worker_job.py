"""The one typed object that every rank of a training run gets from the driver."""

from dataclasses import dataclass
from typing import Any

from jobs.settings.train import TrainSettings
from jobs.train.rows import TrainingRows
from pipelines.data.features.cache import FeatureCache


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedHandle:
    """A feed of batches, and the size of one epoch of its rows."""

    actor: Any
    """Handle of a `BatchFeed` actor."""
    cache: FeatureCache | None
    """Feature cache that takes the place of pixels; None: files are decoded."""
    rows_per_epoch: int
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJob:
    """Settings of a training run with the actors that its ranks call."""

    settings: TrainSettings
    coordinator: Any
    """Handle of the run's `RunCoordinator` actor."""
    training: FeedHandle
    validation: FeedHandle | None
    """None: no validation."""
    order: str
    """Fingerprint of what decides the order of samples."""


def feed_handle(actor: Any, rows: TrainingRows) -> FeedHandle:
    """The handle of a feed actor with the sizes of its rows."""
    order = rows.order
    return FeedHandle(
        actor=actor, cache=rows.cache, rows_per_epoch=order.rows_per_epoch, steps_per_epoch=order.steps_per_epoch
    )
