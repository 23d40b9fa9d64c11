"""Text of unknown encoding: what is not UTF-8 fails single rows, not whole files."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from pipelines.data.corpus.sources.raw import BadRowError

# Bytes that are not UTF-8 become lone surrogates, which `require_unicode` finds; other rows stay usable.
ERRORS = "surrogateescape"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def decode_text(data: bytes) -> str:
    """Decode bytes; what is not UTF-8 is marked for `require_unicode`."""
    return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", ERRORS)


def require_unicode(text: str, what: str) -> str:
    """Check that one value is valid Unicode.

    Args:
        text: Text from `decode_text` or JSON.
        what: Name of the value for the message, e.g. "column 'captions'".

    Raises:
        BadRowError: "corrupt", if it has bytes that are not UTF-8, or half a surrogate pair.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text[max(0, error.start - 20) : error.start + 20].encode("utf-8", "backslashreplace").decode()
            raise BadRowError("corrupt", f"{what} is not UTF-8: {shown}") from None
    return text


def cell_text(value: Any) -> str | None:
    """A cell as text; None if it is empty."""
    if isinstance(value, bytes):
        value = decode_text(value)
    return None if value is None or value == "" else str(value)


def lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of each line."""
    for number, line in enumerate(file, start=1):
        yield number, decode_text(line) if number == 1 else line.decode("utf-8", ERRORS)
