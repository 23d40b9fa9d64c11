"""A minimal client of the caption endpoint."""

from typing import Any

import httpx

from pipelines.data.media.kinds import SNIFFED_BYTES, sniff_kind


class ServiceError(RuntimeError):
    """The service answered with an error."""


def request_caption(base_url: str, media: bytes, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Send one image or video and return the answer: caption, kind, num_frames, model.

    Args:
        base_url: URL of the service, such as "http://127.0.0.1:8000".
        media: Content of the file. Its first bytes decide whether it is an image or a video.
        timeout_s: Limit of each phase: connecting, sending, waiting.

    Raises:
        ServiceError: If the service answers with an error; holds its message.
        httpx.HTTPError: If the service cannot be reached.
    """
    kind = sniff_kind(media[:SNIFFED_BYTES]) or "image"
    # Any subtype will do: the service detects the format from the content.
    headers = {"Content-Type": f"{kind}/*"}
    response = httpx.post(f"{base_url}/v1/caption", content=media, headers=headers, timeout=timeout_s)
    if response.status_code != httpx.codes.OK:
        raise ServiceError(f"status {response.status_code}: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer
