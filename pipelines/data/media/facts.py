"""Facts about a media file besides its pixels, and the hash of its bytes."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, BinaryIO

HASH_BYTES = 16
_CHUNK_BYTES = 1024**2


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFacts:
    """Facts of one image or video stream."""

    codec: str
    """"jpeg", "png", "h264", "vp9", ..."""
    width: int
    """Display size: after the EXIF orientation or the container's rotation; pixel aspect ratios do not count."""
    height: int
    num_frames: int = 1
    """Displayed frames, counted from packets, not from the header; 1 for an image, also an animated one."""
    duration_s: float | None = None
    """Time from the first frame to the end of the last; None for an image."""
    fps: float | None = None
    """Mean over the clip; None for an image and for a single frame."""
    rotation_deg: int = 0
    """Clockwise turn that a viewer applies: 0, 90, 180 or 270."""
    has_audio: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `MediaFacts(**values)`."""
        return dataclasses.asdict(self)


def content_hash(content: bytes | BinaryIO) -> str:
    """Hash of a file's bytes: blake2b, 128 bits, hexadecimal.

    Args:
        content: The bytes, or an open file, which is read to its end in pieces.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        while piece := content.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
