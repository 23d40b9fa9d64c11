"""Image or video: what a file's name or its first bytes say."""

import os

from pipelines.data.schema import IMAGE, VIDEO

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".j2k"),
    *(".mpo", ".ico", ".avif", ".heic", ".heif", ".ppm", ".pgm"),
)
# An animated GIF is a video: as an image, only its first frame would be decoded.
VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".3gp", ".3g2", ".wmv", ".ogv", ".gif"),
)
SNIFFED_BYTES = 192
"""Number of first bytes that `sniff_kind` needs."""
_IMAGE_MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
    b"\0\0\1\0",
)
_VIDEO_MAGIC = (b"GIF8", b"\x1aE\xdf\xa3", b"FLV\1", b"\0\0\1\xba", b"\0\0\1\xb3", b"OggS", b"\x30\x26\xb2\x75")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_IMAGE_BRANDS = (b"avif", b"avis", *HEIC_BRANDS)


def kind_of_name(name: str) -> str | None:
    """Kind of a file by its name's extension: "image", "video", or None when unknown."""
    extension = os.path.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return IMAGE
    return VIDEO if extension in VIDEO_EXTENSIONS else None


def sniff_kind(head: bytes) -> str | None:
    """Kind of a file by its first bytes: "image", "video", or None when unknown.

    Args:
        head: First `SNIFFED_BYTES` bytes or more, or the whole file when it is shorter.
    """
    if head[4:8] == b"ftyp":
        return IMAGE if head[8:12] in _IMAGE_BRANDS else VIDEO
    if head.startswith(b"RIFF"):
        return {b"WEBP": IMAGE, b"AVI ": VIDEO}.get(head[8:12])
    if head.startswith(_IMAGE_MAGIC):
        return IMAGE
    # QuickTime files without ftyp, and MPEG transport streams (a sync byte every 188 bytes).
    if head.startswith(_VIDEO_MAGIC) or head[4:8] in (b"moov", b"mdat", b"wide", b"free"):
        return VIDEO
    return VIDEO if head[:1] == b"\x47" and head[188:189] == b"\x47" else None
