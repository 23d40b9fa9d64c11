"""Files on local disks and on every file system of fsspec (s3://, gs://, memory:// ...)."""

import contextlib
import os
import posixpath
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.data.storage import members

_INDIRECT_PROTOCOLS = (
    *("simplecache", "filecache", "blockcache", "cached", "dir", "generic", "asynclocal", "async_wrapper"),
    *("asyncwrapper", "reference", "zip", "tar", "libarchive", "git", "dvc", "dask"),
)


class FileTooLargeError(OSError):
    """The file exceeds the caller's byte limit."""


class TruncatedFileError(OSError):
    """The file ends before the requested bytes."""


class NotRegularFileError(OSError):
    """A folder, pipe, socket or device instead of a file."""


class IndirectUriError(ValueError):
    """A file system inside another one or inside a file, which could reach this machine's own files."""


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine: plain, or with any protocol that fsspec has for local files."""
    protocol, separator, _ = uri.partition("://")
    return not separator or _is_local_protocol(protocol)


def local_path(uri: str) -> str:
    """Return the absolute path of a local `uri`."""
    return os.path.abspath(_plain(uri))


def require_direct(uri: str) -> None:
    """Check that `uri` is a local path or names a store directly.

    Raises:
        IndirectUriError: If it chains file systems ("simplecache::s3://bucket/a.jpg") or looks into a file ("zip://").
    """
    if not is_local(uri) and ("::" in uri or uri.partition("://")[0] in _INDIRECT_PROTOCOLS):
        raise IndirectUriError(f"{uri} goes through another file system; give the file's own address, without '::'")


def join(uri: str, *names: str) -> str:
    """Append path parts to a folder path or URI."""
    if is_local(uri):
        return os.path.join(_plain(uri), *names)
    return posixpath.join(uri, *names)


def parent(uri: str) -> str:
    """Return the folder that holds `uri`."""
    return os.path.dirname(local_path(uri)) if is_local(uri) else posixpath.dirname(uri)


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""
    if is_local(uri):
        return os.path.exists(local_path(uri))
    return _info(uri) is not None


def is_folder(uri: str) -> bool:
    """Whether a folder (or key prefix) exists."""
    if is_local(uri):
        return os.path.isdir(local_path(uri))
    info = _info(uri)
    return info is not None and info["type"] == "directory"


def list_files(uri: str) -> list[str]:
    """Every file below a folder, as sorted paths relative to it with forward slashes."""
    if is_local(uri):
        root = local_path(uri)
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
        return sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in paths)
    filesystem, path = _filesystem(uri)
    prefix = path.rstrip("/") + "/"
    return sorted(found.removeprefix(prefix) for found in filesystem.find(path))


def open_input(uri: str) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: If it cannot be opened.
    """
    if is_local(uri):
        return open(local_path(uri), "rb")
    filesystem, path = _filesystem(uri)
    return cast(BinaryIO, filesystem.open(path, "rb"))


def read_bytes(uri: str, max_bytes: int) -> bytes:
    """Read a whole file, or a member of a tar shard (see `members`).

    Raises:
        FileTooLargeError: If it holds more than `max_bytes`; nothing is read then.
        TruncatedFileError: If a member's shard ends before the member does.
        OSError: If it is missing, unreadable or (locally) not a regular file.
    """
    member = members.parse(uri)
    if member is not None:
        if member.length > max_bytes:
            raise FileTooLargeError(f"{member.length} bytes exceed the limit of {max_bytes}")
        content = read_range(member.shard, member.offset, member.length)
        if len(content) < member.length:
            raise TruncatedFileError(f"the shard ends {member.length - len(content)} bytes before its member does")
        return content
    with open_regular(uri) as file:
        size_bytes = os.fstat(file.fileno()).st_size if is_local(uri) else _size_bytes(uri)
        if size_bytes > max_bytes:
            raise FileTooLargeError(f"{size_bytes} bytes exceed the limit of {max_bytes}")
        # The size may be unknown, or the file may grow during the read: the limit still holds.
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise FileTooLargeError(f"more than the limit of {max_bytes} bytes")
    return content


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Read `length` bytes from `offset`; fewer where the file ends sooner, none beyond its end.

    Raises:
        OSError: If it is missing, unreadable or (locally) not a regular file.
    """
    if is_local(uri):
        with open_regular(uri) as file:
            file.seek(offset)
            return file.read(length)
    filesystem, path = _filesystem(uri)
    try:
        return bytes(filesystem.cat_file(path, start=offset, end=offset + length))
    except Exception:  # each store has its own error for a range beyond the end
        if offset >= int(filesystem.size(path) or 0):
            return b""
        raise


def size_bytes(uri: str) -> int:
    """Size of a file.

    Raises:
        OSError: If it is missing or (locally) not a regular file.
    """
    return require_regular(local_path(uri)).st_size if is_local(uri) else _size_bytes(uri)


def open_regular(uri: str) -> BinaryIO:
    """Like `open_input`, but refuses local pipes and devices, whose opening or reading may never end."""
    if is_local(uri):
        require_regular(local_path(uri))
    return open_input(uri)


def require_regular(path: str) -> os.stat_result:
    """Check that a local path is a regular file.

    Raises:
        FileNotFoundError: If nothing is there.
        NotRegularFileError: If it is something else.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise NotRegularFileError(f"{path} is {what}, not a file")
    return status


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file; on local disks a reader sees either the old or the new content, never a part."""
    with open_output(uri) as file:
        file.write(content)


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Open a file for writing in pieces; on local disks it gets its name only when it is complete."""
    if not is_local(uri):
        with fsspec.open(uri, "wb") as file:
            yield cast(BinaryIO, file)
        return
    path = local_path(uri)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def move_file(uri: str, target: str) -> None:
    """Rename a file within its file system, replacing a file of that name."""
    if is_local(uri):
        os.replace(local_path(uri), local_path(target))
    else:
        filesystem, path = _filesystem(uri)
        filesystem.mv(path, _filesystem(target)[1])


def remove_file(uri: str) -> None:
    """Delete an existing file."""
    if is_local(uri):
        os.unlink(local_path(uri))
    else:
        filesystem, path = _filesystem(uri)
        filesystem.rm_file(path)


def fetch_folder(uri: str, target: str) -> None:
    """Copy the content of a remote folder into an existing local one."""
    filesystem, path = _filesystem(uri)
    filesystem.get(path.rstrip("/") + "/", f"{target}/", recursive=True)


def remove_folder(uri: str) -> None:
    """Delete an existing folder with its content."""
    if is_local(uri):
        shutil.rmtree(local_path(uri))
    else:
        filesystem, path = _filesystem(uri)
        filesystem.rm(path, recursive=True)


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 file, atomically on local disks."""
    write_bytes(uri, text.encode())


def folder_names(uri: str) -> list[str]:
    """Names in a folder; none where it does not exist."""
    if not is_folder(uri):
        return []
    if is_local(uri):
        return os.listdir(local_path(uri))
    filesystem, path = _filesystem(uri)
    # Some file systems cache listings; a checkpoint may be newer than the cache.
    filesystem.invalidate_cache()
    return [posixpath.basename(name.rstrip("/")) for name in filesystem.ls(path, detail=False)]


def _size_bytes(uri: str) -> int:
    filesystem, path = _filesystem(uri)
    return int(filesystem.size(path) or 0)


def _info(uri: str) -> dict[str, Any] | None:
    """A file system's information about a path; None where nothing exists. Its own `exists` may hide other errors."""
    filesystem, path = _filesystem(uri)
    try:
        return dict(filesystem.info(path))
    except FileNotFoundError:
        return None


def _filesystem(uri: str) -> tuple[Any, str]:
    require_direct(uri)
    filesystem, path = fsspec.core.url_to_fs(uri)
    if isinstance(filesystem, LocalFileSystem):
        # fsspec takes "c://" for a drive. Such a path has not passed the checks for pipes and devices.
        raise ValueError(f"Protocol not known: {uri.partition('://')[0]}")
    return filesystem, str(path)


def _plain(uri: str) -> str:
    """A local path without its protocol."""
    protocol, separator, path = uri.partition("://")
    return path if separator and _is_local_protocol(protocol) else uri


def _is_local_protocol(protocol: str) -> bool:
    if protocol in ("s3", "gs"):
        return False  # avoids loading their drivers
    try:
        return issubclass(fsspec.get_filesystem_class(protocol), LocalFileSystem)
    except (ImportError, ValueError):
        return False
