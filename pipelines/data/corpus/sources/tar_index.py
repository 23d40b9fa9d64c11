"""Positions of the members of an uncompressed tar, from its headers; nothing is unpacked."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data import storage
from pipelines.data.corpus.sources.text import decode_text
from pipelines.data.failures import ErrorClass
from pipelines.data.storage.retries import with_retries
from qformer.errors import UserError

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 512
_LOCAL_READ_BYTES = 64 * 1024
"""Bytes per read. Small on local disks, where skipping a large member costs nothing; a request to a remote store costs
more than the bytes of most images."""
_REMOTE_READ_BYTES = 8 * 1024**2
_MAX_NAME_BYTES = 64 * 1024
"""Limit for a long name or a pax record: their sizes come from the file and cannot be trusted."""
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
_KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "sparse"}


@dataclass(frozen=True, slots=True)
class TarMember:
    """One regular file in a tar, or the error of an entry."""

    name: str
    """Name inside the tar; never opened as a path."""
    offset: int
    length: int
    error_class: ErrorClass | None = None
    message: str = ""


class _DamageError(Exception):
    """The tar cannot be read beyond this point."""


def walk_tar(uri: str) -> Iterator[TarMember]:
    """Yield the entries of a tar in order, without folders; reads little more than the headers.

    Entries that are not regular files, or whose names leave the tar, have an error class. So do a truncated member at
    the end of the tar, and a damaged header, after which nothing more is found.

    Raises:
        UserError: If the tar is compressed.
        MediaError: If it cannot be read.
    """
    file = _BufferedFile(uri)
    _require_plain(uri, file.at(0, _BLOCK_BYTES))
    reader = _EntryReader(file)
    position = 0
    while True:
        try:
            found = reader.entry(position)
        except _DamageError as error:
            yield TarMember(f"byte {position}", position, 0, "corrupt", f"{error}; what follows cannot be found")
            return
        if found is None:
            if position == file.size_bytes:
                logger.warning("%s has no end marker: it may have been truncated between two members", uri)
            return
        member, position = found
        if member is not None:
            yield member


class _EntryReader:
    """Reads an entry together with the extended headers before it."""

    def __init__(self, file: "_BufferedFile") -> None:
        self._file = file

    def entry(self, position: int) -> tuple[TarMember | None, int] | None:
        """The entry at `position` and the position of the next; None at the end."""
        long_name: str | None = None
        long_size: int | None = None
        while True:
            header = self._file.at(position, _BLOCK_BYTES)
            if not header.strip(b"\0"):
                return None  # the end marker, or the end of a tar without one
            if len(header) < _BLOCK_BYTES:
                raise _DamageError("the tar ends inside a header")
            if _number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
                raise _DamageError("damaged tar header")
            length, kind = _number(header[124:136]), header[156:157]
            if length < 0:
                raise _DamageError("damaged tar header")
            content = position + _BLOCK_BYTES
            if kind not in (b"L", b"K", b"x", b"g"):
                break
            record = self._record(content, length)
            if kind == b"L":
                long_name = decode_text(record.rstrip(b"\0"))
            elif kind == b"x":
                values = _pax(record)
                long_name = decode_text(values[b"path"]) if b"path" in values else long_name
                long_size = int(values[b"size"]) if values.get(b"size", b"").isdigit() else long_size
            position = content + _padded(length)
        name = long_name if long_name is not None else _name(header)
        length = long_size if long_size is not None else length
        end = content + (_padded(length) if kind in (*_REGULAR, b"S") else 0)
        return self._member(name, kind, content, length), end

    def _member(self, name: str, kind: bytes, offset: int, length: int) -> TarMember | None:
        if kind == _FOLDER or (kind == b"\0" and name.endswith("/")):
            return None
        if kind not in _REGULAR:
            what = _KINDS.get(kind, f"an entry of type {kind!r}")
            return TarMember(name, offset, 0, "unsupported", f"member {name!r} is {what}; only files are read")
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            return TarMember(name, offset, length, "unsupported", f"member {name!r} leaves the tar; rename it")
        missing = offset + length - self._file.size_bytes
        if missing > 0:
            return TarMember(
                name, offset, length, "corrupt", f"member {name!r} is truncated: {missing} bytes are missing"
            )
        return TarMember(name, offset, length)

    def _record(self, offset: int, length: int) -> bytes:
        if length > _MAX_NAME_BYTES:
            raise _DamageError(f"an extended header of {length} bytes")
        record = self._file.at(offset, length)
        if len(record) < length:
            raise _DamageError("the tar ends inside an extended header")
        return record


class _BufferedFile:
    """Random access to a file's bytes, read in large pieces."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.size_bytes = with_retries(uri, lambda: storage.size_bytes(uri))
        self._step = _LOCAL_READ_BYTES if storage.is_local(uri) else _REMOTE_READ_BYTES
        self._start, self._bytes = 0, b""

    def at(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`; fewer at the end of the file."""
        length = max(0, min(length, self.size_bytes - offset))
        if not length:
            return b""
        if not self._start <= offset <= offset + length <= self._start + len(self._bytes):
            wanted = max(self._step, length)
            self._start = offset
            self._bytes = with_retries(self._uri, lambda: storage.read_range(self._uri, offset, wanted))
        return self._bytes[offset - self._start :][:length]


def _require_plain(uri: str, head: bytes) -> None:
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{uri} is compressed, and its members cannot be read by position; {command} it first")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return decode_text(prefix + b"/" + name if prefix else name)


def _number(field: bytes) -> int:
    """Parse octal digits, or (GNU, above 8 GiB) big-endian bytes after a marker; -1 when it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return -1


def _padded(length: int) -> int:
    return -(-length // _BLOCK_BYTES) * _BLOCK_BYTES


def _pax(record: bytes) -> dict[bytes, bytes]:
    """Records of length, space, key=value, newline; the length counts all of it."""
    values: dict[bytes, bytes] = {}
    while record:
        digits, _, rest = record.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = rest[: max(0, length - len(digits) - 2)].partition(b"=")
        if not equals:
            raise _DamageError("damaged extended header")
        values[key] = value
        record = record[length:]
    return values
