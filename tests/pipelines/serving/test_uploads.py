"""Bodies to media: what is let through, and how the rest is refused."""

import asyncio
import base64
import dataclasses
import json

import pytest
from PIL import Image

from pipelines.data.samples import DecodeSettings
from pipelines.serving.decoding import DecodePool
from pipelines.serving.errors import ApiError
from pipelines.serving.uploads import kinds_of, parse_upload, read_body
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.pipelines.data.builders import PREPROCESSING, limited_memory
from tests.pipelines.data.builders import encoded as image_bytes

GIF = b"GIF89a" + bytes(30)
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"


def as_json(**fields):
    return json.dumps(fields).encode()


def encoded(data):
    return base64.b64encode(data).decode()


def refusal(content_type, body):
    with pytest.raises(ApiError) as caught:
        parse_upload(content_type, body)
    return caught.value.status, caught.value.kind


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


def test_raw_and_json_bodies():
    image, clip = jpeg_bytes(), mp4_bytes()
    assert parse_upload("image/png; q=1", image).data == image  # the subtype may be wrong, the kind not
    assert parse_upload("VIDEO/MP4", clip).kind == "video"
    assert parse_upload("application/json", as_json(image=encoded(image))).data == image
    assert parse_upload("application/json; charset=utf-8", as_json(video=encoded(clip))).data == clip
    wrapped = "data:image/jpeg;base64," + base64.encodebytes(image).decode()  # lines of 76 characters
    assert parse_upload("application/json", as_json(image=wrapped)).data == image
    assert (parse_upload("image/gif", GIF).kind, parse_upload("video/gif", GIF).kind) == ("image", "video")


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
        ("application/json", b"{", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b"\xff\xfe", 400),
        ("application/json", b"[]", 400),
        ("application/json", as_json(), 400),
        ("application/json", as_json(image="AAAA", video="AAAA"), 400),
        ("application/json", as_json(path="/etc/passwd"), 400),
        ("application/json", as_json(image=3), 400),
        ("application/json", as_json(image="not base64!"), 400),
        ("application/json", as_json(image="ä"), 400),
        ("application/json", as_json(image=""), 400),
        ("application/json", as_json(video=encoded(PLAYLIST)), 400),
        ("application/json", as_json(image=encoded(mp4_bytes())), 415),
    ],
)
def test_refusals(content_type, body, status):
    assert refusal(content_type, body)[0] == status


@pytest.mark.parametrize("url", ["http://localhost/a.jpg", "file:///etc/passwd", " HTTPS://x/y", "s3://b/k"])
def test_urls_are_never_fetched(url):
    with pytest.raises(ApiError, match="fetches nothing"):
        parse_upload("application/json", as_json(image=url))


class Chunks:
    """A client's body, which counts what was taken of it."""

    def __init__(self, *sizes):
        self.sizes, self.taken = sizes, 0

    async def __aiter__(self):
        for size in self.sizes:
            self.taken += 1
            yield bytes(size)


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
    read = read_body(aiter(Chunks(*sizes)), content_length, max_bytes=10)
    if status is None:
        assert len(asyncio.run(read)) == 10
    else:
        with pytest.raises(ApiError) as caught:
            asyncio.run(read)
        assert caught.value.status == status


def test_reading_stops_at_the_limit():
    chunks = Chunks(*[4] * 1000)
    with pytest.raises(ApiError):
        asyncio.run(read_body(aiter(chunks), None, max_bytes=10))
    assert chunks.taken == 3


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_thin_pictures_take_little_memory(size):
    """They are a few hundred bytes; scaled to 224 as a whole, 12 GB."""
    side = dataclasses.replace(PREPROCESSING, height=224, width=224, resize_short_side=224)
    pool = DecodePool(DecodeSettings(preprocessing=side), num_threads=1)
    upload = parse_upload("image/png", image_bytes(Image.new("RGB", size, (200, 10, 10)), "PNG"))
    with limited_memory(2 * 1024**3):
        pixels = asyncio.run(pool.decode(upload))
    assert pixels.shape == (1, 3, 224, 224) and pixels.mean(axis=(0, 2, 3)).tolist() == [200, 10, 10]
