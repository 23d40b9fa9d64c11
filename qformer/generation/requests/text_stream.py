"""Token ids become text piece by piece, without half characters and with nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer shows bytes that are no whole character yet."""


class TextStream:
    """The text of one answer as it grows; its pieces joined are the whole text, stripped.

    Args:
        tokenizer: A Hugging Face tokenizer.
        stop: The text ends before the first of these.
        is_streamed: Give text at each call; False gives all of it at `finish` and looks at nothing before, unless
            there are stop strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), is_streamed: bool = True) -> None:
        self._tokenizer, self._stop, self._is_streamed = tokenizer, tuple(stop), is_streamed
        self.ids: list[int] = []
        self.is_stopped = False
        """A stop string has come."""
        self._text = ""
        """All whole characters so far, cut at the stop string."""
        self._num_told = 0
        """Characters of it that were given away, or left out as leading space."""
        # Ids in front of `_read` are in `_text`. To know what the ones behind it add, both are decoded from `_start`
        # on, for what a token's text is depends on its neighbours.
        self._start = self._read = 0
        self._known = ""
        """Text of the ids between `_start` and `_read`."""

    def add(self, token_id: int) -> str:
        """Append a token and return what can be told now."""
        self.ids.append(token_id)
        if not self._is_streamed and not self._stop:
            return ""
        self._grow()
        return self._tell() if self._is_streamed else ""

    def finish(self) -> str:
        """Return the rest of the text."""
        if not self.is_stopped:
            whole = self._decode(self.ids)
            if whole.startswith(self._text[: self._num_told]):
                self._text = whole
                self._cut_at_stop(0)
        rest = self._text[self._num_told :].rstrip()
        return rest if self._text[: self._num_told].strip() else rest.lstrip()

    def _grow(self) -> None:
        fresh = self._decode(self.ids[self._start :])
        if fresh.endswith(_UNFINISHED) or len(fresh) <= len(self._known):
            return
        old = len(self._text)
        self._text += fresh[len(self._known) :]
        self._start, self._read = self._read, len(self.ids)
        self._known = self._decode(self.ids[self._start : self._read])
        self._cut_at_stop(old)

    def _cut_at_stop(self, old: int) -> None:
        """End the text at the first stop string, of which at least the last character lies behind `old`."""
        begins = [self._text.find(text, max(0, old - len(text) + 1)) for text in self._stop]
        if found := [begin for begin in begins if begin >= 0]:
            self._text, self.is_stopped = self._text[: min(found)], True

    def _tell(self) -> str:
        """Text up to what may become a stop string or the trailing space."""
        end = len(self._text.rstrip()) if self.is_stopped else len(self._text[: self._safe_end()].rstrip())
        if self._num_told == 0:
            self._num_told = min(end, len(self._text) - len(self._text.lstrip()))
        piece = self._text[self._num_told : end]
        self._num_told = max(self._num_told, end)
        return piece

    def _safe_end(self) -> int:
        """Where the longest end of the text that begins a stop string starts."""
        text = self._text
        for begin in range(max(0, len(text) - max(map(len, self._stop), default=1) + 1), len(text)):
            if any(stop.startswith(text[begin:]) for stop in self._stop):
                return begin
        return len(text)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
