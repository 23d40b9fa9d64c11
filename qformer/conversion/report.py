"""What became of every tensor when weights moved from one model into another."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Every tensor of a source and of the model it was loaded into."""

    source: str
    """What it is called."""
    loaded: Sequence[str]
    reinitialised: Sequence[str] = ()
    """In the model only, as the change of model implies: initialised anew."""
    missing: Sequence[str] = ()
    """In the model only though the source should have them, or of another shape: initialised anew on request."""
    left_out: Sequence[str] = ()
    """In the source only, as the change of model implies: another stage's heads, tied copies, named backbones."""
    unexpected: Sequence[str] = ()
    """In the source only, and unknown: left out on request."""
    notes: Sequence[str] = field(default=())

    def lines(self) -> list[str]:
        """One line for each kind of tensor, then the notes."""
        kinds = {
            "loaded": self.loaded,
            "re-initialised": self.reinitialised,
            "missing": self.missing,
            "left out": self.left_out,
            "unexpected": self.unexpected,
        }
        return [*(f"{kind} {len(names)} tensors{_groups(names)}" for kind, names in kinds.items()), *self.notes]

    def __str__(self) -> str:
        return f"from {self.source}: {'; '.join(self.lines())}"


def shown(names: Iterable[str]) -> str:
    """A list of names for people: the number and the first few."""
    names = sorted(names)
    if not names:
        return "none"
    rest = len(names) - _NAMES_SHOWN
    return f"{len(names)} ({', '.join(names[:_NAMES_SHOWN])}{f' and {rest} more' if rest > 0 else ''})"


def _groups(names: Iterable[str]) -> str:
    """What the names belong to, layers folded together: " (qformer.layers.attention, vision_norm)"."""
    groups = sorted({re.sub(r"\.\d+(?=\.|$)", "", name).rpartition(".")[0] or name for name in names})
    short = sorted({".".join(group.split(".")[:3]) for group in groups})
    return f" ({', '.join(short)})" if short else ""
