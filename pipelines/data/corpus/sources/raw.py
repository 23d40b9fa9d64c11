"""What readers yield: rows as their files have them, and rows that cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.data.failures import ErrorClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One place rows come from."""

    path: str
    """File or folder, local or fsspec URI; of tar shards also a pattern such as shard-{000..127}.tar."""
    format: str = "auto"
    """One of `detect.FORMATS`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name -> the source's own."""
    media_root: str = ""
    """Where relative media paths start; "" for the folder of the table."""
    kind: str = "auto"
    """"image", "video", or "auto" to take the row's own, else the file name, else the first bytes."""
    split: str = "train"
    """Of rows that name none."""
    name: str = ""
    """Told apart by it in mixtures and reports; "" keeps the rows' own names."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row under our column names, its values unchecked."""

    number: int
    """Counted from 1 within the source; of lines where the source has lines."""
    place: str
    """For a person: "captions.jsonl, line 3"."""
    values: Mapping[str, Any]
    sample_id: str | None = None
    """What to call a row without a sample id of its own; None: its media path."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read; it becomes a quarantine row."""

    number: int
    place: str
    error_class: ErrorClass
    message: str
    media: str | None = None


class BadRowError(Exception):
    """Raised inside readers and builders for the row at hand.

    Attributes:
        error_class: As in the quarantine table.
        message: One line for a person.
    """

    def __init__(self, error_class: ErrorClass, message: str) -> None:
        super().__init__(message)
        self.error_class: ErrorClass = error_class
        self.message = message
