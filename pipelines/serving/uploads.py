"""From an HTTP body to media bytes of a known kind.

Nothing here opens a path or a connection: media come in the body or not at all. The first bytes decide what a
body is, and only binary containers are let through. That keeps playlists (HLS, DASH, concat) away from the
demuxers, which would follow the paths and addresses written in them.
"""

import base64
import binascii
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pipelines.data.media import SNIFFED_BYTES, sniff_kind
from pipelines.data.schema import IMAGE, VIDEO
from pipelines.serving.errors import ApiError

_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)
# Whitespace that encoders put between lines of base64.
_BLANKS = {ord(blank): None for blank in " \t\r\n"}


@dataclass(frozen=True)
class Upload:
    """One image or video as it came in."""

    kind: str
    """"image" or "video"."""
    data: bytes


async def read_body(stream: AsyncIterator[bytes], content_length: str | None, max_bytes: int) -> bytes:
    """Read a body chunk by chunk and stop at the limit, whether or not the client declared a length.

    Raises:
        ApiError: 413 over `max_bytes`, 400 for a Content-Length that is no number.
    """
    too_large = ApiError(413, "body_too_large", f"the body exceeds {max_bytes} bytes; send a smaller file")
    if content_length is not None:
        if not content_length.isdecimal():
            raise ApiError(400, "invalid_request", f"Content-Length {content_length[:40]!r} is not a number")
        if int(content_length[:20]) > max_bytes:
            raise too_large
    chunks, size_bytes = [], 0
    async for chunk in stream:
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def parse_upload(content_type: str | None, body: bytes) -> Upload:
    """Find the media in a body: raw under `image/*` or `video/*`, base64 in JSON otherwise.

    Raises:
        ApiError: 415 for other content types and for content of the other kind, 400 for an empty body, bad
            JSON or base64, and bytes that are no known image or video format.
    """
    media_type = (content_type or "").split(";")[0].strip().lower()
    if not body:
        raise ApiError(400, "invalid_request", "the body is empty; send an image or a video")
    if media_type == "application/json":
        declared, data = _from_json(body)
    elif media_type.startswith("image/"):
        declared, data = IMAGE, body
    elif media_type.startswith("video/"):
        declared, data = VIDEO, body
    else:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Type {media_type[:80]!r} is not one of image/*, video/*, application/json",
        )
    return Upload(_agreed_kind(declared, kinds_of(data)), data)


def kinds_of(data: bytes) -> tuple[str, ...]:
    """What the first bytes say the content can be: a GIF both, unknown formats neither."""
    if data.startswith((b"GIF87a", b"GIF89a")):
        return (IMAGE, VIDEO)
    found = sniff_kind(data[:SNIFFED_BYTES])
    return () if found is None else (found,)


def _agreed_kind(declared: str, found: tuple[str, ...]) -> str:
    if not found:
        raise ApiError(400, "invalid_media", f"the bytes are no {declared} format this server knows")
    if declared not in found:
        raise ApiError(415, "unsupported_media_type", f"declared as {declared}, but the bytes are a {found[0]}")
    return declared


def _from_json(body: bytes) -> tuple[str, bytes]:
    """Decode `{"image": base64}` or `{"video": base64}`."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_request", f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict) or len(fields) != 1 or not fields.keys() <= {IMAGE, VIDEO}:
        wanted = '{"image": "<base64>"} or {"video": "<base64>"}'
        raise ApiError(400, "invalid_request", f"the JSON body must be exactly {wanted}")
    [(name, text)] = fields.items()
    if not isinstance(text, str):
        raise ApiError(400, "invalid_request", f"{name!r} must be a base64 string")
    if _URL.match(text):
        raise ApiError(400, "invalid_request", f"{name!r} is a URL; this server fetches nothing, send the bytes")
    prefix = _DATA_URL.match(text)
    encoded = text[prefix.end() if prefix else 0 :].translate(_BLANKS)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "invalid_request", f"{name!r} is not valid base64: {str(error)[:200]}") from None
    if not data:
        raise ApiError(400, "invalid_request", f"{name!r} is empty")
    return name, data
