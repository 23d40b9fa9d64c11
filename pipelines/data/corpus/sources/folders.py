"""Folders of media files with captions in sidecar files NAME.txt or NAME.json."""

import json
import os
from collections.abc import Iterator
from typing import Any

from pipelines.data import schema, storage
from pipelines.data.corpus.sources.files import list_source, read_source_bytes
from pipelines.data.corpus.sources.raw import BadRow, BadRowError, RawRow
from pipelines.data.corpus.sources.text import decode_text
from pipelines.data.failures import MediaError
from pipelines.data.media.kinds import kind_of_name
from qformer.errors import UserError

SIDECARS = (".json", ".txt")
_MAX_SIDECAR_BYTES = 16 * 1024**2


def read_folder(path: str) -> Iterator[RawRow | BadRow]:
    """Yield one row a media file, sorted by name; its id is its path below the folder.

    A sidecar NAME.txt has one caption a line, a sidecar NAME.json an object with `captions` or `caption` and any other
    column of the manifest.

    Raises:
        UserError: If there are no media files.
        MediaError: If the storage cannot be read.
    """
    names = list_source(path)
    all_names = set(names)
    number = 0
    for name in names:
        if kind_of_name(name) is None:
            continue
        number += 1
        place = storage.join(path, name)
        sidecar = next((found for found in _sidecars(name) if found in all_names), None)
        try:
            values = {} if sidecar is None else sidecar_values(sidecar, _content(storage.join(path, sidecar)))
        except BadRowError as error:
            yield BadRow(number, place, error.error_class, error.message, media=name)
            continue
        yield RawRow(number, place, {**values, schema.MEDIA: name}, sample_id=name)
    if not number:
        raise UserError(f"folder {path} holds no image or video files; check the path")


def sidecar_values(name: str, content: bytes) -> dict[str, Any]:
    """Column values from a text or JSON sidecar file.

    Args:
        name: File name, for its extension and for messages.
        content: Content of the file.

    Raises:
        BadRowError: "corrupt", if it is not a JSON object.
    """
    text = decode_text(content)
    if not name.lower().endswith(".json"):
        return {schema.CAPTIONS: text.splitlines()}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError("corrupt", f"{name} is not JSON ({str(error)[:80]})") from None
    if not isinstance(values, dict):
        raise BadRowError("corrupt", f"{name} is not a JSON object")
    for one, several in schema.SINGULAR.items():
        if one in values:
            values.setdefault(several, values.pop(one))
    return values


def _sidecars(name: str) -> Iterator[str]:
    """Possible names of a sidecar file: photo.txt, or photo.jpg.txt."""
    for stem in (os.path.splitext(name)[0], name):
        yield from (stem + extension for extension in SIDECARS)


def _content(uri: str) -> bytes:
    try:
        return read_source_bytes(uri, _MAX_SIDECAR_BYTES)
    except MediaError as error:
        if error.error_class in ("transient", "config"):
            raise  # a fault of the storage must not fail a row
        raise BadRowError(error.error_class, f"{uri}: {error.message}") from error
