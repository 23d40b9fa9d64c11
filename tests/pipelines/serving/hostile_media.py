"""Files that are no usable image or video: damaged, lying, oversized, or something else altogether."""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.media_files import jpeg_bytes, mp4_bytes

_FOLDER = Path(os.environ.get("QFORMER_TEST_DATA") or Path(__file__).parents[3] / "../shared/data").resolve()

# First bytes of formats that a server may know; noise follows.
_MAGIC = {
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "png": b"\x89PNG\r\n\x1a\n",
    "gif": b"GIF89a",
    "webp": b"RIFF\x00\x40\x00\x00WEBPVP8 ",
    "tiff": b"II*\x00\x08\x00\x00\x00",
    "avif": b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00",
    "mp4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41",
    "webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01",
    "avi": b"RIFF\x00\x40\x00\x00AVI LIST",
    "flv": b"FLV\x01\x05\x00\x00\x00\x09",
}
_OTHERS = {
    "empty-like": b" ",
    "nulls": bytes(1000),
    "text": b"hello world\n" * 20,
    "html": b"<!doctype html><script>alert(1)</script>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run\n",
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "dash": b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>",
    "zip": b"PK\x03\x04" + bytes(60),
    "gzip": b"\x1f\x8b\x08" + bytes(60),
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
    "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "wav": b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00",
}


def hostile_media(num_seeds: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, the kind that it claims to be, content.

    Args:
        num_seeds: Of noise and cuts; more make more files.
    """
    for name, content in _OTHERS.items():
        yield f"{name}-as-image", "image", content
        yield f"{name}-as-video", "video", content
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        noise = rng.bytes(int(rng.integers(1, 4000)))
        for name, magic in _MAGIC.items():
            yield f"{name}-noise-{seed}", "video" if name in ("mp4", "webm", "avi", "flv") else "image", magic + noise
        image, clip = jpeg_bytes(seed), mp4_bytes(seed)
        yield f"jpeg-cut-{seed}", "image", image[: int(rng.integers(3, len(image) // 2))]
        yield f"mp4-cut-{seed}", "video", clip[: int(rng.integers(32, len(clip) // 2))]
        yield f"image-as-video-{seed}", "video", image
        yield f"video-as-image-{seed}", "image", clip
    yield "png-of-2500-megapixels", "image", _png(50_000, 50_000, b"\x00" * 100)
    yield "png-of-no-pixels", "image", _png(0, 0, b"")
    yield "png-without-pixels", "image", _png(64, 64, b"")
    yield (
        "png-with-100-MB-of-text",
        "image",
        _png(8, 8, b"\x00" * 8 * 25, _chunk(b"zTXt", b"a\0\0" + _zeros(100 * 2**20))),
    )
    yield from _recorded()


def _recorded() -> Iterator[tuple[str, str, bytes]]:
    """Real files that no decoder can read, where QFORMER_TEST_DATA is there."""
    manifest = _FOLDER / "MANIFEST.json"
    if not manifest.is_file():
        return
    for record in json.loads(manifest.read_text())["records"]:
        truth = record["ground_truth"]
        if record["kind"] in ("image", "video") and truth.get("expected") in ("must_fail", "no_video_stream"):
            yield record["path"], record["kind"], (_FOLDER / record["path"]).read_bytes()


def _png(width: int, height: int, pixels: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _zeros(count: int) -> bytes:
    """That many zero bytes, deflated."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(count // 2**20)) + packer.flush()
