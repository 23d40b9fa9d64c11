"""Failures of single samples: the error that readers raise, and the record that tables carry."""

from dataclasses import dataclass
from typing import Literal

ErrorClass = Literal["corrupt", "unsupported", "missing", "too_large", "timeout", "transient", "config"]
"""Why a sample cannot be used."""
FailureStage = Literal["manifest", "read", "decode"]
"""Where a sample failed: the row itself, reading its file, or decoding it."""


class MediaError(Exception):
    """A media file that cannot be used. It becomes a quarantine row and never ends a job.

    Attributes:
        error_class: Reason, one of a few words by which tables can be grouped.
        message: Explanation in one line.
        stage: "manifest" (the row is wrong), "read" (the file cannot be read) or "decode" (it cannot be decoded).
        tries: Number of attempts.
    """

    def __init__(
        self, error_class: ErrorClass, message: str, *, stage: FailureStage = "decode", tries: int = 1
    ) -> None:
        # Decoders echo parts of binary files in their messages.
        self.message = " ".join(message.split())[:300] or error_class
        super().__init__(f"{error_class}: {self.message}")
        self.error_class: ErrorClass = error_class
        self.stage: FailureStage = stage
        self.tries = tries


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that cannot be used; it becomes a row of the quarantine table."""

    sample_id: str
    media: str | None
    stage: str
    error_class: str
    message: str
    tries: int = 1
