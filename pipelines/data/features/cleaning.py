"""Finds feature caches that no run refers to, and removes their files; other files are never removed."""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import fsspec

from pipelines.data import storage
from pipelines.data.corpus.quarantine import QUARANTINE_FILE
from pipelines.data.features.files import INDEX_FILE
from pipelines.data.features.spec import SPEC_FILE, read_spec
from qformer.errors import UserError

_JOB_FILES = ("settings.yaml", "summary.json", QUARANTINE_FILE)
_SHARD_FILE = re.compile(r"shard-\d{8}\.(arrow|parquet)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFolder:
    """A folder with the spec file of a feature cache."""

    folder: str
    vision: str
    """Name of its encoder."""
    files: tuple[str, ...]
    """All files of the folder, relative to it."""
    size_bytes: int
    keep_reason: str | None
    """Reason to keep it; None: nothing refers to it."""


def find_caches(folder: str, referred: Iterable[str], min_age_h: float) -> list[CacheFolder]:
    """Find the caches in `folder` and below.

    Args:
        folder: Path or URI.
        referred: Cache folders as the settings of runs spell them.
        min_age_h: Hours without a change after which a cache may be removed; newer ones may be used by a later run.

    Raises:
        UserError: If the folder does not exist.
    """
    if not storage.is_folder(folder):
        raise UserError(f"caches={folder} is not a folder; give one with feature caches")
    names = [_absolute(name) for name in referred]
    below = storage.list_files(folder)
    caches = []
    for spec_file in below:
        if spec_file.rpartition("/")[2] != SPEC_FILE:
            continue
        prefix = spec_file.removesuffix(SPEC_FILE)
        # A cache inside another one counts as foreign files, so the outer one is kept.
        files = tuple(name.removeprefix(prefix) for name in below if name.startswith(prefix))
        root = storage.join(folder, prefix.rstrip("/")) if prefix else folder
        caches.append(_inspect_cache(root, files, names, min_age_h))
    return caches


def remove_cache(cache: CacheFolder) -> None:
    """Remove a cache's files; the spec last, so that an interrupted removal can be repeated."""
    assert cache.keep_reason is None, cache
    for name in sorted(cache.files, key=lambda name: (name == SPEC_FILE, name != INDEX_FILE)):
        storage.remove_file(storage.join(cache.folder, name))
    if storage.is_local(cache.folder):
        with contextlib.suppress(OSError):  # a new file may be in it
            os.rmdir(storage.local_path(cache.folder))


def _inspect_cache(folder: str, files: tuple[str, ...], referred: list[str], min_age_h: float) -> CacheFolder:
    paths = [storage.join(folder, name) for name in files]
    age_h = (time.time() - max(map(_modified_at_s, paths))) / 3600
    foreign = [name for name in files if not _is_cache_file(name)]
    vision, keep_reason = "unknown", None
    try:
        spec = read_spec(folder)
        vision = spec.vision if spec else vision
    except (UserError, ValueError, KeyError, TypeError):
        keep_reason = f"its {SPEC_FILE} has an unknown format"
    if keep_reason is None and _absolute(folder) in referred:
        keep_reason = "a run refers to it"
    elif keep_reason is None and foreign:
        keep_reason = f"it also contains {foreign[0]!r}"
    elif keep_reason is None and age_h < min_age_h:
        keep_reason = f"it changed {age_h:.1f} h ago"
    return CacheFolder(
        folder=folder,
        vision=vision,
        files=files,
        size_bytes=sum(map(storage.size_bytes, paths)),
        keep_reason=keep_reason,
    )


def _is_cache_file(name: str) -> bool:
    plain = _TEMPORARY.sub("", name)
    return plain in (SPEC_FILE, INDEX_FILE, *_JOB_FILES) or _SHARD_FILE.fullmatch(plain) is not None


def _absolute(folder: str) -> str:
    """Canonical spelling of a folder, with links resolved."""
    return os.path.realpath(storage.local_path(folder)) if storage.is_local(folder) else folder.rstrip("/")


def _modified_at_s(uri: str) -> float:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return float(filesystem.modified(path).timestamp())
