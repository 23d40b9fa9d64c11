"""Ask a running caption service."""

from typing import Any

import httpx

from pipelines.data.media.kinds import SNIFFED_BYTES, sniff_kind


class ServiceError(RuntimeError):
    """The service answered with an error."""


def request_caption(base_url: str, media: bytes, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Send one image or video and return the answer: caption, kind, num_frames, model.

    Args:
        base_url: As `jobs.serve.job.served` yields it.
        media: Content of the file; its kind is read from its first bytes.
        timeout_s: For each of connecting, sending and waiting.

    Raises:
        ServiceError: With the service's own message.
        httpx.HTTPError: If the service cannot be reached.
    """
    kind = sniff_kind(media[:SNIFFED_BYTES]) or "image"
    # The subtype is free: the service looks at the content.
    headers = {"Content-Type": f"{kind}/*"}
    response = httpx.post(f"{base_url}/v1/caption", content=media, headers=headers, timeout=timeout_s)
    if response.status_code != httpx.codes.OK:
        raise ServiceError(f"status {response.status_code}: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer
