"""Reading of a source's files with retries; a persistent storage failure stops the run and fails no row."""

import contextlib
import io
from typing import BinaryIO, cast

from pipelines.data import storage
from pipelines.data.storage.retries import with_retries

_BUFFER_BYTES = 1024**2


def open_source(uri: str) -> BinaryIO:
    """Open a file for reading; after a transient failure it is opened again and read from the same position.

    Raises:
        MediaError: If the retries fail, here or in a later read.
    """
    return cast(BinaryIO, io.BufferedReader(_RetryingFile(uri), _BUFFER_BYTES))


def read_source_bytes(uri: str, max_bytes: int) -> bytes:
    """Read a small file, or a member of a tar shard.

    Raises:
        MediaError: If the retries fail; "too_large" if it has more than `max_bytes`.
    """
    return with_retries(uri, lambda: storage.read_bytes(uri, max_bytes))


def list_source(uri: str) -> list[str]:
    """`storage.list_files` with retries."""
    return with_retries(uri, lambda: storage.list_files(uri))


def is_source_folder(uri: str) -> bool:
    """`storage.is_folder` with retries."""
    return with_retries(uri, lambda: storage.is_folder(uri))


def source_exists(uri: str) -> bool:
    """`storage.exists` with retries."""
    return with_retries(uri, lambda: storage.exists(uri))


class _RetryingFile(io.RawIOBase):
    """A file whose reads are retried."""

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
        content = with_retries(self._uri, lambda: self._read_piece(len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(_BUFFER_BYTES) or b"", b""))

    def close(self) -> None:
        self._drop_file()
        super().close()

    def _read_piece(self, length: int) -> bytes:
        try:
            file = self._opened()
            file.seek(self._position)
            return file.read(length)
        except BaseException:
            self._drop_file()  # its state is unknown
            raise

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = storage.open_regular(self._uri)
            with contextlib.suppress(ValueError):  # a stream that cannot seek to its end
                size_bytes = self._file.seek(0, io.SEEK_END)
                if self._size_bytes not in (None, size_bytes):
                    raise storage.TruncatedFileError(f"{self._uri} changed while it was read; run again")
                self._size_bytes = size_bytes
        return self._file

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
