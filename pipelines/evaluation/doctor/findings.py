"""The form of a finding: topic, status, text and advice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem", "unknown"]
_ORDER: tuple[Status, ...] = ("ok", "unknown", "warning", "problem")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of one check."""

    topic: str
    """Name of the check, in two or three words."""
    status: Status
    """Result; "unknown": the run did not record it, or the check could not run."""
    text: str
    """One line with the measured values."""
    advice: str = ""
    """Advice; "" if there is nothing to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Measured values for programs; JSON-ready."""


def not_recorded(topic: str, what: str) -> Finding:
    """Finding of a run without the record that the check needs."""
    return Finding(topic=topic, status="unknown", text=f"not recorded: {what}")


def worst(statuses: Iterable[Status]) -> Status:
    """The most severe status; "ok" if there are none."""
    return max(statuses, key=_ORDER.index, default="ok")


def listed(names: Sequence[Any], most: int = 4) -> str:
    """The first names, and the total number if there are more."""
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
