"""What a look at a run found: one line each, whether it is well, and what to do where it is not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem", "unknown"]
_ORDER: tuple[Status, ...] = ("ok", "unknown", "warning", "problem")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    """What was looked at, in two or three words."""
    status: Status
    """"unknown": it was not recorded, or could not be looked at."""
    text: str
    """What was found, with its figures."""
    advice: str = ""
    """What to do; "" where there is nothing to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    """For programs; JSON-ready."""


def not_recorded(topic: str, what: str) -> Finding:
    """A run that left no such record behind."""
    return Finding(topic=topic, status="unknown", text=f"not recorded: {what}")


def worst(statuses: Iterable[Status]) -> Status:
    """The gravest of some statuses; "ok" of none."""
    return max(statuses, key=_ORDER.index, default="ok")


def listed(names: Sequence[Any], most: int = 4) -> str:
    """The first few of some names, and how many more there are."""
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
