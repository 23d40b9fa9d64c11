"""A source's files: what may pass in their storage is waited out; what does not stops the run, and blames no row."""

import contextlib
import io
from typing import BinaryIO, cast

from pipelines.data import storage
from pipelines.data.storage.retries import with_retries

_BUFFER_BYTES = 1024**2


def open_source(uri: str) -> BinaryIO:
    """Open a file for reading; where a read fails in passing, it is opened again and read on.

    Raises:
        MediaError: Here or from a read, as `retries.with_retries`.
    """
    return cast(BinaryIO, io.BufferedReader(_RetryingFile(uri), _BUFFER_BYTES))


def read_source_bytes(uri: str, max_bytes: int) -> bytes:
    """Read a small file, or a member of a tar shard.

    Raises:
        MediaError: As `retries.with_retries`; "too_large" if it holds more than `max_bytes`.
    """
    return with_retries(uri, lambda: storage.read_bytes(uri, max_bytes))


def list_source(uri: str) -> list[str]:
    """As `storage.list_files`, with retries."""
    return with_retries(uri, lambda: storage.list_files(uri))


def is_source_folder(uri: str) -> bool:
    """As `storage.is_folder`, with retries."""
    return with_retries(uri, lambda: storage.is_folder(uri))


def source_exists(uri: str) -> bool:
    """As `storage.exists`, with retries."""
    return with_retries(uri, lambda: storage.exists(uri))


class _RetryingFile(io.RawIOBase):
    """A file by position, each piece of it read with retries."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri
        self._position = 0
        self._size_bytes: int | None = None
        self._file: BinaryIO | None = None
        with_retries(uri, self._opened)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes or 0}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = with_retries(self._uri, lambda: self._piece(len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(_BUFFER_BYTES) or b"", b""))

    def close(self) -> None:
        self._forget()
        super().close()

    def _piece(self, length: int) -> bytes:
        try:
            file = self._opened()
            file.seek(self._position)
            return file.read(length)
        except BaseException:
            self._forget()  # nobody knows what state it is in
            raise

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = storage.open_regular(self._uri)
            with contextlib.suppress(ValueError):  # a stream without an end to go to
                size_bytes = self._file.seek(0, io.SEEK_END)
                if self._size_bytes not in (None, size_bytes):
                    raise storage.TruncatedFileError(f"{self._uri} changed while it was read; run again")
                self._size_bytes = size_bytes
        return self._file

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
