"""Media bytes of a known kind, from an HTTP body.

Nothing here opens a path or a connection. The first bytes decide what a body is, and only binary containers are
accepted. Playlists (HLS, DASH, concat) therefore never reach the demuxers, which would follow the paths and addresses
in them.
"""

import base64
import binascii
import re
from dataclasses import dataclass

from pipelines.data.media.kinds import SNIFFED_BYTES, sniff_kind
from pipelines.data.schema import IMAGE, VIDEO
from pipelines.serving.contract.errors import ApiError

_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_DATA_URL = re.compile(r"data:([^;,]{0,100})(?:;[^;,]{0,100})*?(;base64)?,", re.IGNORECASE)
_MAX_HEAD_CHARACTERS = 1024
"""Longest header of a data: URL; the regular expression needs about 150 bytes per character."""
_BLANKS = b" \t\r\n"
"""Whitespace between lines of base64."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One image or video of a request."""

    kind: str
    """"image" or "video"."""
    data: bytes = b""
    url: str | None = None
    """URL to fetch the media from; None: `data` holds the media."""


def parse_raw(content_type: str | None, body: bytes) -> Upload:
    """Read the media of a raw body with the content type `image/*` or `video/*`.

    Raises:
        ApiError: 415 for other content types and for content of the other kind, 400 for an empty body and bytes that
            are no known image or video format.
    """
    media_type = (content_type or "").split(";")[0].strip().lower()
    kind = media_type.partition("/")[0]
    if kind not in (IMAGE, VIDEO):
        message = f"Content-Type {media_type[:80]!r} is not one of image/*, video/*, application/json"
        raise ApiError(415, "unsupported_media_type", message)
    if not body:
        raise ApiError(400, "invalid_request", "the body is empty; send an image or a video")
    require_kind(kind, body)
    return Upload(kind, body)


def parse_reference(kind: str, text: str, param: str) -> Upload:
    """Read the media of a JSON field: base64, a data: URL, or another URL, which is checked when it is fetched.

    Raises:
        ApiError: 415 for content of the other kind, 400 for bad base64 and bytes that are no known format.
    """
    if prefix := _DATA_URL.match(text, 0, _MAX_HEAD_CHARACTERS):
        declared = prefix[1].partition("/")[0].strip().lower()
        if prefix[2] is None:
            raise ApiError(400, "invalid_media", f"{param!r}: a data: URL must end its head in ;base64,", param=param)
        if declared not in ("", kind, "application"):
            message = f"{param!r} is declared as {prefix[1][:80]!r}; it must be {kind}/*"
            raise ApiError(415, "unsupported_media_type", message, param=param)
        text = text[prefix.end() :]
    elif _URL.match(text[:100]):
        return Upload(kind, url=text)
    try:
        data = base64.b64decode(text.encode("ascii").translate(None, _BLANKS), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"{param!r} is not valid base64 ({str(error)[:100]}); encode the file's bytes"
        raise ApiError(400, "invalid_base64", message, param=param) from None
    if not data:
        raise ApiError(400, "invalid_media", f"{param!r} is empty; send an image or a video", param=param)
    require_kind(kind, data, param)
    return Upload(kind, data)


def kinds_of(data: bytes) -> tuple[str, ...]:
    """Media kinds of the content, by its first bytes: both for a GIF, none for unknown formats."""
    if data.startswith((b"GIF87a", b"GIF89a")):
        return (IMAGE, VIDEO)
    found = sniff_kind(data[:SNIFFED_BYTES])
    return () if found is None else (found,)


def require_kind(declared: str, data: bytes, param: str | None = None) -> None:
    """Check that the content is of the declared kind.

    Raises:
        ApiError: 400 for an unknown format, 415 for the other kind.
    """
    found = kinds_of(data)
    if not found:
        message = f"the bytes are no {declared} format this server knows; send a JPEG, PNG, WebP or MP4"
        raise ApiError(400, "invalid_media", message, param=param)
    if declared not in found:
        message = f"declared as {declared}, but the bytes are a {found[0]}; send it as {found[0]}"
        raise ApiError(415, "unsupported_media_type", message, param=param)
