"""Results of the readers: raw rows with unchecked values, and rows that cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.data.failures import ErrorClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Location and settings of one source of rows."""

    path: str
    """File or folder, local or fsspec URI; of tar shards also a pattern such as shard-{000..127}.tar."""
    format: str = "auto"
    """One of `detect.FORMATS`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Manifest column -> the source's own column."""
    media_root: str = ""
    """Folder of relative media paths; "" for the folder of the table."""
    kind: str = "auto"
    """"image", "video", or "auto" to take the row's own, else the file name, else the first bytes."""
    split: str = "train"
    """Split of rows without one."""
    name: str = ""
    """Source name in mixtures and reports; "" keeps the rows' own names."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row under the manifest's column names, with unchecked values."""

    number: int
    """Number of the row within the source, from 1; the line number where the source has lines."""
    place: str
    """Location for messages: "captions.jsonl, line 3"."""
    values: Mapping[str, Any]
    sample_id: str | None = None
    """Sample id of a row that has none itself; None: its media path."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read; it becomes a quarantine row."""

    number: int
    place: str
    error_class: ErrorClass
    message: str
    media: str | None = None


class BadRowError(Exception):
    """Raised inside readers and builders for the current row.

    Attributes:
        error_class: Error class of the quarantine table.
        message: Explanation in one line.
    """

    def __init__(self, error_class: ErrorClass, message: str) -> None:
        super().__init__(message)
        self.error_class: ErrorClass = error_class
        self.message = message
