"""Report of a load: which tensors of a source and of a model were loaded, initialised or skipped."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Every tensor of a source and of the model it was loaded into."""

    source: str
    """Name of the source."""
    loaded: Sequence[str]
    reinitialised: Sequence[str] = ()
    """Names in the model only, as the change of model implies; initialised."""
    missing: Sequence[str] = ()
    """Names that the source should have but lacks or has in another shape; initialised on request."""
    left_out: Sequence[str] = ()
    """Names in the source only, as the change of model implies: another stage's heads, tied copies, backbones."""
    unexpected: Sequence[str] = ()
    """Unknown names in the source only; skipped on request."""
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


def format_names(names: Iterable[str]) -> str:
    """The number of names and the first few, for messages."""
    names = sorted(names)
    if not names:
        return "none"
    rest = len(names) - _NAMES_SHOWN
    return f"{len(names)} ({', '.join(names[:_NAMES_SHOWN])}{f' and {rest} more' if rest > 0 else ''})"


def _groups(names: Iterable[str]) -> str:
    """Modules of the names, with layers merged: " (qformer.layers.attention, vision_norm)"."""
    groups = sorted({re.sub(r"\.\d+(?=\.|$)", "", name).rpartition(".")[0] or name for name in names})
    short = sorted({".".join(group.split(".")[:3]) for group in groups})
    return f" ({', '.join(short)})" if short else ""
