"""What can go wrong with one media file or row: the error that readers raise, and the record that tables carry."""

from dataclasses import dataclass
from typing import Literal

ErrorClass = Literal["corrupt", "unsupported", "missing", "too_large", "timeout", "transient", "config"]
"""Why a sample cannot be used."""
FailureStage = Literal["manifest", "read", "decode"]
"""Where it failed: the row itself, reading its file, or decoding it."""


class MediaError(Exception):
    """One media file that cannot be used. It becomes a quarantine row, never a dead job.

    Attributes:
        error_class: Why, as one of a few words that tables can be grouped by.
        message: One line for a person.
        stage: "read" (bytes could not be had), "decode" (bytes made no picture) or "manifest" (the row is wrong).
        tries: How often it was attempted.
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
    """One sample that could not be decoded; a future quarantine row."""

    sample_id: str
    media: str | None
    stage: str
    error_class: str
    message: str
    tries: int = 1
