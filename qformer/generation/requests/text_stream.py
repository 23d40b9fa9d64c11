"""Incremental decoding of token ids: whole characters only, and no part of a stop string."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Character that a tokenizer returns for an incomplete one."""


class TextStream:
    """The text of one answer as it grows; its pieces joined are the whole text, stripped.

    Args:
        tokenizer: A Hugging Face tokenizer.
        stop: Strings before which the text ends.
        is_streamed: Whether each call returns new text; False returns all text at `finish`, and decodes before only if
            there are stop strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), is_streamed: bool = True) -> None:
        self._tokenizer, self._stop, self._is_streamed = tokenizer, tuple(stop), is_streamed
        self.ids: list[int] = []
        self.is_stopped = False
        """Whether a stop string was generated."""
        self._text = ""
        """All whole characters so far, up to the stop string."""
        self._num_returned = 0
        """Number of its characters that were returned, or skipped as leading space."""
        # Ids before `_read` are in `_text`. To find the text of later ids, all are decoded from `_start`, because a
        # token's text depends on its neighbours.
        self._start = self._read = 0
        self._decoded_text = ""
        """Text of the ids between `_start` and `_read`."""

    def add(self, token_id: int) -> str:
        """Append a token and return the text that is final now."""
        self.ids.append(token_id)
        if not self._is_streamed and not self._stop:
            return ""
        self._grow()
        return self._take_final() if self._is_streamed else ""

    def finish(self) -> str:
        """Return the rest of the text."""
        if not self.is_stopped:
            whole = self._decode(self.ids)
            if whole.startswith(self._text[: self._num_returned]):
                self._text = whole
                self._cut_at_stop(0)
        rest = self._text[self._num_returned :].rstrip()
        return rest if self._text[: self._num_returned].strip() else rest.lstrip()

    def _grow(self) -> None:
        fresh = self._decode(self.ids[self._start :])
        if fresh.endswith(_UNFINISHED) or len(fresh) <= len(self._decoded_text):
            return
        old = len(self._text)
        self._text += fresh[len(self._decoded_text) :]
        self._start, self._read = self._read, len(self.ids)
        self._decoded_text = self._decode(self.ids[self._start : self._read])
        self._cut_at_stop(old)

    def _cut_at_stop(self, old: int) -> None:
        """End the text at the first stop string that ends after position `old`."""
        begins = [self._text.find(text, max(0, old - len(text) + 1)) for text in self._stop]
        if found := [begin for begin in begins if begin >= 0]:
            self._text, self.is_stopped = self._text[: min(found)], True

    def _take_final(self) -> str:
        """Return new text, except a possible beginning of a stop string and trailing space."""
        end = len(self._text.rstrip()) if self.is_stopped else len(self._text[: self._safe_end()].rstrip())
        if self._num_returned == 0:
            self._num_returned = min(end, len(self._text) - len(self._text.lstrip()))
        piece = self._text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return piece

    def _safe_end(self) -> int:
        """Start of the longest suffix of the text that may begin a stop string."""
        text = self._text
        for begin in range(max(0, len(text) - max(map(len, self._stop), default=1) + 1), len(text)):
            if any(stop.startswith(text[begin:]) for stop in self._stop):
                return begin
        return len(text)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
