"""Raw rows of the readers to checked rows of the manifest."""

import math
from collections.abc import Mapping
from typing import Any

from pipelines.data import schema, storage
from pipelines.data.corpus.sources.raw import BadRowError, RawRow
from pipelines.data.corpus.sources.text import cell_text, require_unicode
from pipelines.data.failures import MediaError
from pipelines.data.media.kinds import SNIFFED_BYTES, kind_of_name, sniff_kind
from pipelines.data.names import suggest
from pipelines.data.storage import members
from pipelines.data.storage.retries import with_retries

Row = dict[str, Any]
_MAX_MEDIA_CHARS = 4096


class RowBuilder:
    """Checks and completes single rows.

    Args:
        media_root: Folder of relative media paths.
        kind: "image", "video" or "auto".
        split: Split of rows without one.
        source: Name of the source; "" keeps the rows' own names.
    """

    def __init__(self, *, media_root: str, kind: str, split: str, source: str) -> None:
        self._root, self._kind, self._split, self._source = media_root, kind, split, source

    def build(self, raw: RawRow) -> tuple[Row, str | None]:
        """Make a manifest row.

        Returns:
            The row, and the sample id to use where it has none.

        Raises:
            BadRowError: If it cannot be used.
        """
        values = raw.values
        given, data = _media(values)
        media = None if given is None else self._complete(given)
        sample_id = _text(values, schema.SAMPLE_ID)
        start_s, end_s = _seconds(values, schema.START_S), _seconds(values, schema.END_S)
        if end_s is not None and end_s <= (start_s or 0.0):
            raise BadRowError("config", f"end_s={end_s:g} is not after start_s={start_s or 0.0:g}")
        captions, instructions = _paired(values)
        row = {
            schema.SAMPLE_ID: sample_id,
            schema.MEDIA: media,
            schema.MEDIA_BYTES: data,
            schema.KIND: self._kind_of(values, media, data),
            schema.CAPTIONS: captions,
            schema.INSTRUCTIONS: instructions,
            schema.START_S: start_s,
            schema.END_S: end_s,
            schema.SPLIT: _text(values, schema.SPLIT) or self._split,
            schema.LICENCE: _text(values, schema.LICENCE),
            schema.SOURCE: self._source or _text(values, schema.SOURCE),
        }
        return row, raw.sample_id or given or f"row-{raw.number}"

    def _complete(self, media: str) -> str:
        """Make an absolute path or URI; relative paths must stay below the media root."""
        if len(media) > _MAX_MEDIA_CHARS or "\0" in media:
            raise BadRowError("config", f"media {media[:60]!r}… is not a path")
        try:
            storage.require_direct(media)
        except storage.IndirectUriError as error:
            raise BadRowError("config", str(error)) from error
        if "://" in media and not storage.is_local(media):
            return media
        if "://" in media or media.startswith("/"):
            return storage.local_path(media)
        depth = 0
        for part in media.replace("\\", "/").split("/"):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                raise BadRowError(
                    "config", f"media {media!r} leaves the media root {self._root}; set media_root higher"
                )
        joined = storage.join(self._root, media)
        return storage.local_path(joined) if storage.is_local(joined) else joined

    def _kind_of(self, values: Mapping[str, Any], media: str | None, data: bytes | None) -> str:
        found = self._kind if self._kind != "auto" else _text(values, schema.KIND)
        if found is None:
            # An unidentified file is decoded as an image, and quarantined as unsupported.
            found = kind_of_name(media or "") or _sniffed(media, data) or schema.IMAGE
        if found not in schema.KINDS:
            raise BadRowError("config", f"column {schema.KIND!r} holds {found!r}{suggest(found, schema.KINDS)}")
        return found


def _media(values: Mapping[str, Any]) -> tuple[str | None, bytes | None]:
    """The media reference and the file's content, at least one of them."""
    given: Any = values.get(schema.MEDIA)
    data: Any = values.get(schema.MEDIA_BYTES)
    if isinstance(given, dict):  # {bytes, path}, as Hugging Face datasets keep images
        data = given.get("bytes") if data is None else data
        given = given.get("path")
    elif isinstance(given, bytes) and data is None:
        given, data = None, given
    if given is not None and not isinstance(given, str):
        raise BadRowError("config", f"column {schema.MEDIA!r} holds a {type(given).__name__}; give a path")
    if data is not None and not isinstance(data, bytes):
        raise BadRowError("config", f"column {schema.MEDIA_BYTES!r} holds a {type(data).__name__}; give bytes")
    media = None if not given else require_unicode(given, f"column {schema.MEDIA!r}")
    if media is None and data is None:
        raise BadRowError("config", f"the row has no {schema.MEDIA}")
    return media, data


def _text(values: Mapping[str, Any], column: str) -> str | None:
    text = cell_text(values.get(column))
    return None if text is None else require_unicode(text, f"column {column!r}")


def _paired(values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Non-empty captions and their instructions; one instruction may serve all captions."""
    captions, instructions = _texts(values, schema.CAPTIONS), _texts(values, schema.INSTRUCTIONS)
    if len(instructions) > 1:
        if len(instructions) != len(captions):
            counts = f"{len(captions)} {schema.CAPTIONS} but {len(instructions)} {schema.INSTRUCTIONS}"
            raise BadRowError("config", f"the row has {counts}; give one for all captions, or one for each")
        instructions = [text for text, caption in zip(instructions, captions, strict=True) if caption]
    return [caption for caption in captions if caption], instructions if any(instructions) else []


def _texts(values: Mapping[str, Any], column: str) -> list[str]:
    value = values.get(column)
    texts = [value] if isinstance(value, str | bytes) else value or []
    if isinstance(texts, list):
        texts = [cell_text(text) or "" if isinstance(text, bytes) else text for text in texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRowError("config", f"column {column!r} holds {str(value)[:60]!r}; give a text or a list of texts")
    return [require_unicode(text, f"column {column!r}").strip() for text in texts]


def _seconds(values: Mapping[str, Any], column: str) -> float | None:
    value = values.get(column)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BadRowError("config", f"column {column!r} holds {str(value)[:60]!r}; give seconds, 0 or more")
    return seconds


def _sniffed(media: str | None, data: bytes | None) -> str | None:
    if data is not None:
        return sniff_kind(data[:SNIFFED_BYTES])
    if media is None or not storage.is_local(media) or members.parse(media):
        return None
    try:
        return sniff_kind(with_retries(media, lambda: storage.read_range(media, 0, SNIFFED_BYTES)))
    except MediaError as error:
        if error.error_class == "transient":
            raise  # otherwise it would wrongly be called an image
        return None  # the later check of the file reports the error
