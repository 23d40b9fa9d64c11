"""Request bodies: read within limits of size and time, and parsed within a limit of structure."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import pydantic_core

from pipelines.serving.contract.config import RequestLimits
from pipelines.serving.contract.errors import ApiError

ValueT = TypeVar("ValueT")

LARGE_BODY_BYTES = 256 * 1024
"""Size from which bodies are parsed in a thread."""
MAX_STRUCTURE = 100_000
"""Largest number of brackets and commas in a JSON body: each becomes a Python object many times its size."""


async def read_body(stream: AsyncIterator[bytes], content_length: str | None, limits: RequestLimits) -> bytes:
    """Read a body chunk by chunk and stop at the limits, whether or not the client declared a length.

    Raises:
        ApiError: 413 over `max_body_bytes`, 408 after `body_timeout_s`, 400 if Content-Length is no number.
    """
    message = f"the body exceeds {limits.max_body_bytes} bytes; send a smaller file"
    too_large = ApiError(413, "body_too_large", message)
    if content_length is not None:
        if not content_length.isdecimal():
            raise ApiError(400, "invalid_request", f"Content-Length {content_length[:40]!r} is not a number")
        if int(content_length[:20]) > limits.max_body_bytes:
            raise too_large
    chunks, size_bytes = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in stream:
                size_bytes += len(chunk)
                if size_bytes > limits.max_body_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not come within {limits.body_timeout_s:g} s; send it faster, or a smaller file"
        raise ApiError(408, "body_timeout", message) from None
    return b"".join(chunks)


async def parse_off_loop(body: bytes, parse: Callable[[bytes], ValueT]) -> ValueT:
    """Parse a body; a large one in a thread, so that the event loop stays free."""
    return parse(body) if len(body) < LARGE_BODY_BYTES else await asyncio.to_thread(parse, body)


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether the headers declare a JSON body."""
    return headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON body that holds one object.

    Raises:
        ApiError: 400 if it does not, is nested too deeply, or has too many parts.
    """
    if sum(body.count(sign) for sign in (b"[", b"{", b",")) > MAX_STRUCTURE:
        raise ApiError(400, "invalid_request", f"the JSON body has more than {MAX_STRUCTURE} parts; send fewer")
    try:
        # The parser limits the depth to 200 and rejects invalid Unicode.
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}; send one JSON object") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", f"the JSON body is a {type(value).__name__}; send one object {{…}}")
    return value
