"""Bodies to media: what is let through, and how the rest is refused."""

import asyncio
import base64
import dataclasses
import tracemalloc

import pytest
from PIL import Image

from pipelines.data.media.samples import DecodeSettings
from pipelines.serving.contract.config import RequestLimits
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.contract.uploads import Upload, kinds_of, parse_raw, parse_reference
from pipelines.serving.http.bodies import MAX_STRUCTURE, parse_json, read_body
from pipelines.serving.workers.media import DecodePool
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.pipelines.data.builders import PREPROCESSING, limited_memory
from tests.pipelines.data.builders import encoded as image_bytes

GIF = b"GIF89a" + bytes(30)
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"


def encoded(data):
    return base64.b64encode(data).decode()


def refused(read, *arguments):
    with pytest.raises(ApiError) as caught:
        read(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (jpeg_bytes(), ("image",)),
        (mp4_bytes(), ("video",)),
        (GIF, ("image", "video")),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", ("image",)),
        (b"\x00\x00\x00\x20ftypavif", ("image",)),
        (PLAYLIST, ()),
        (b"ffconcat version 1.0\nfile /etc/passwd", ()),
        (b"%!PS-Adobe-3.0 EPSF-3.0", ()),  # Pillow would start Ghostscript
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ()),
        (b"", ()),
    ],
)
def test_kind_is_read_from_the_content(data, kinds):
    assert kinds_of(data) == kinds


def test_raw_bodies_and_references():
    image, clip = jpeg_bytes(), mp4_bytes()
    assert parse_raw("image/png; q=1", image).data == image  # the subtype may be wrong, the kind not
    assert parse_raw("VIDEO/MP4", clip).kind == "video"
    assert parse_reference("image", encoded(image), "image").data == image
    assert parse_reference("video", "data:;base64," + encoded(clip), "video") == Upload("video", clip)
    wrapped = "data:image/jpeg;charset=x;base64," + base64.encodebytes(image).decode()  # lines of 76 characters
    assert parse_reference("image", wrapped, "image").data == image
    assert (parse_raw("image/gif", GIF).kind, parse_raw("video/gif", GIF).kind) == ("image", "video")


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("image/jpeg", b"", 400),
        ("image/jpeg", b"no picture at all", 400),
        ("video/mp4", PLAYLIST, 400),
        ("application/vnd.apple.mpegurl", PLAYLIST, 415),
        ("image/jpeg", mp4_bytes(), 415),
        ("video/mp4", jpeg_bytes(), 415),
        ("text/plain", jpeg_bytes(), 415),
        (None, jpeg_bytes(), 415),
    ],
)
def test_raw_refusals(content_type, body, status):
    assert refused(parse_raw, content_type, body).status == status


@pytest.mark.parametrize(
    ("kind", "text", "status", "code"),
    [
        ("image", "not base64!", 400, "invalid_base64"),
        ("image", "QUJD*", 400, "invalid_base64"),
        ("image", "ä", 400, "invalid_base64"),
        ("image", "data:image/jpeg;base64,", 400, "invalid_media"),
        ("image", "data:image/jpeg,abc", 400, "invalid_media"),  # not base64
        ("image", "data:text/html;base64,QUJD", 415, "unsupported_media_type"),
        ("image", "data:video/mp4;base64," + encoded(mp4_bytes()), 415, "unsupported_media_type"),
        ("video", encoded(PLAYLIST), 400, "invalid_media"),
        ("image", encoded(mp4_bytes()), 415, "unsupported_media_type"),
    ],
)
def test_reference_refusals(kind, text, status, code):
    error = refused(parse_reference, kind, text, "messages[0].content[1]")
    assert (error.status, error.code, error.refusal.param) == (status, code, "messages[0].content[1]")


def test_a_head_without_end_costs_nothing():
    tracemalloc.start()
    try:
        parse_reference("image", "data:" + ";" * 100_000, "image")  # a URL, which nobody fetches
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # by an expression without bounds, 15,000,000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("url", ["http://localhost/a.jpg", "file:///etc/passwd", " HTTPS://x/y", "s3://b/k", "ftp:x"])
def test_urls_are_handed_on_to_whoever_checks_them(url):
    assert parse_reference("image", url, "image") == Upload("image", url=url)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b"[" * 100_000,
        b'{"a": [' + b"[]," * MAX_STRUCTURE + b"[]]}",
        b'{"a": ' + b"9" * 5000 + b"e",
    ],
)
def test_bad_json_is_refused(body):
    assert refused(parse_json, body).status == 400


class Chunks:
    """A client's body, which counts what was taken of it."""

    def __init__(self, *sizes):
        self.sizes, self.taken = sizes, 0

    async def __aiter__(self):
        for size in self.sizes:
            self.taken += 1
            yield bytes(size)


TEN_BYTES = RequestLimits(max_body_bytes=10, body_timeout_s=0.2)


@pytest.mark.parametrize(
    ("sizes", "content_length", "status"),
    [
        ((5, 5), None, None),
        ((5, 5), "10", None),
        ((5, 6), None, 413),
        ((), "11", 413),
        ((), "1" * 5000, 413),
        ((), "-1", 400),
    ],
)
def test_body_limit(sizes, content_length, status):
    read = read_body(aiter(Chunks(*sizes)), content_length, TEN_BYTES)
    if status is None:
        assert len(asyncio.run(read)) == 10
    else:
        assert refused(asyncio.run, read).status == status


def test_reading_stops_at_the_limit():
    chunks = Chunks(*[4] * 1000)
    refused(asyncio.run, read_body(aiter(chunks), None, TEN_BYTES))
    assert chunks.taken == 3


def test_a_body_that_trickles_is_given_up():
    async def trickle():
        while True:
            await asyncio.sleep(0.05)
            yield b""

    error = refused(asyncio.run, read_body(trickle(), None, TEN_BYTES))
    assert (error.status, error.code) == (408, "body_timeout")


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_thin_pictures_take_little_memory(size):
    """They are a few hundred bytes; scaled to 224 as a whole, 12 GB."""
    side = dataclasses.replace(PREPROCESSING, height=224, width=224, resize_short_side=224)
    upload = parse_raw("image/png", image_bytes(Image.new("RGB", size, (200, 10, 10)), "PNG"))

    async def decode():
        return await DecodePool(1).decode(upload, DecodeSettings(preprocessing=side))

    with limited_memory(2 * 1024**3):
        pixels = asyncio.run(decode()).pixels
    assert pixels.shape == (1, 3, 224, 224) and pixels.mean(axis=(0, 2, 3)).tolist() == [200, 10, 10]
