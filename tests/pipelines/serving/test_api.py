"""Deadlines, limits and failures of the HTTP interface, in one process: real decoders, a backend told how to behave."""

import asyncio
import contextlib
import io

import httpx
import numpy as np
from PIL import Image

from pipelines.data.samples import DecodeSettings, Limits
from pipelines.serving.api import CaptionService, build_http
from pipelines.serving.config import ServingConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.model import caption_samples
from qformer.config import GenerationSettings
from qformer.preprocessing import Preprocessing
from tests.media_files import jpeg_bytes, mp4_bytes, png_bytes

PREPROCESSING = Preprocessing(
    height=32, width=32, resize_short_side=32, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
IMAGE = {"Content-Type": "image/jpeg"}
VIDEO = {"Content-Type": "video/mp4"}


class Backend:
    """Answers "ok" after a delay, or raises."""

    def __init__(self, delay_s=0.0, error=None):
        self.delay_s, self.error, self.seen = delay_s, error, []

    async def caption(self, pixels):
        await asyncio.sleep(self.delay_s)
        if self.error:
            raise self.error
        self.seen.append(pixels)
        return "ok"

    async def ping(self):
        if self.error:
            raise self.error


def config(**changes):
    limits = Limits(max_pixels=10_000_000, video_timeout_s=changes.pop("video_timeout_s", 20.0))
    values = {
        "checkpoint": "unused",
        "model_name": "run/step-00000003",
        "decode": DecodeSettings(preprocessing=PREPROCESSING, num_frames=4, limits=limits),
        "max_body_bytes": 100_000,
        "request_timeout_s": 30.0,
    }
    return ServingConfig(**values | changes)


@contextlib.asynccontextmanager
async def client(backend, **changes):
    http = build_http(CaptionService(config(**changes), backend))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(http), base_url="http://test") as session:
        yield session


async def ask(backend, content, headers, **changes):
    async with client(backend, **changes) as session:
        return await session.post("/v1/caption", content=content, headers=headers)


def post(backend, content, headers, **changes):
    return asyncio.run(ask(backend, content, headers, **changes))


def assert_error(response, status, kind):
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    error = response.json()["error"]
    assert set(error) == {"type", "message"} and error["type"] == kind and error["message"]


def test_image_and_clip_reach_the_model_as_in_training():
    backend = Backend()
    assert post(backend, jpeg_bytes(), IMAGE).json() == {
        "caption": "ok",
        "kind": "image",
        "num_frames": 1,
        "model": "run/step-00000003",
    }
    assert post(backend, mp4_bytes(), VIDEO).json()["num_frames"] == 4
    assert [(p.dtype, p.shape) for p in backend.seen] == [(np.uint8, (1, 3, 32, 32)), (np.uint8, (4, 3, 32, 32))]


def test_bad_media():
    assert_error(post(Backend(), jpeg_bytes()[:2000], IMAGE), 400, "invalid_media")
    assert_error(post(Backend(), mp4_bytes()[:800], VIDEO), 400, "invalid_media")
    assert_error(post(Backend(), png_bytes((4000, 3000)), IMAGE), 422, "media_too_large")


def test_body_limit_without_declared_length():
    async def endless():
        while True:
            yield bytes(10_000)

    assert_error(post(Backend(), endless(), IMAGE), 413, "body_too_large")


def test_deadline_covers_upload_and_model():
    async def slow():
        while True:
            await asyncio.sleep(0.05)
            yield b"x"

    assert_error(post(Backend(), slow(), IMAGE, request_timeout_s=0.3), 504, "timeout")
    assert_error(post(Backend(delay_s=5), jpeg_bytes(), IMAGE, request_timeout_s=0.5), 504, "timeout")


def test_a_slow_clip_is_given_up():
    assert_error(post(Backend(), mp4_bytes(), VIDEO, video_timeout_s=0.01), 504, "timeout")


def test_too_many_requests_are_refused_and_places_come_back():
    async def run():
        async with client(Backend(delay_s=0.5), max_concurrent_requests=2) as session:
            tasks = [session.post("/v1/caption", content=jpeg_bytes(), headers=IMAGE) for _ in range(5)]
            first = await asyncio.gather(*tasks)
            second = await session.post("/v1/caption", content=jpeg_bytes(), headers=IMAGE)
        return first, second

    first, second = asyncio.run(run())
    assert sorted(response.status_code for response in first) == [200, 200, 503, 503, 503]
    refused = [response for response in first if response.status_code == 503]
    assert_error(refused[0], 503, "overloaded")
    assert refused[0].headers["retry-after"] == "1"
    assert second.status_code == 200


def test_failures_of_the_model_tell_nothing_of_our_insides():
    response = post(Backend(error=RuntimeError("secret path /x")), jpeg_bytes(), IMAGE)
    assert_error(response, 500, "internal")
    assert "secret" not in response.text
    assert_error(post(Backend(error=ApiError(503, "unavailable", "gone", 1)), jpeg_bytes(), IMAGE), 503, "unavailable")


def test_routing_errors_and_health_are_json():
    async def run(backend):
        async with client(backend) as session:
            return [
                await session.get("/healthz"),
                await session.get("/nowhere"),
                await session.get("/v1/caption"),
                await session.get("/docs"),
            ]

    health, missing, method, docs = asyncio.run(run(Backend()))
    assert health.json() == {"status": "ok", "model": "run/step-00000003"}
    assert_error(missing, 404, "not_found")
    assert_error(method, 405, "method_not_allowed")
    assert method.headers["allow"] == "POST"
    assert_error(docs, 404, "not_found")
    assert_error(asyncio.run(run(Backend(error=RuntimeError("dead"))))[0], 503, "unavailable")


class Captioner:
    """A captioner that cannot see black."""

    def __init__(self):
        self.batches = []

    def answer(self, pixels, settings):
        self.batches.append(len(pixels))
        if (pixels.flatten(1).amax(dim=1) == 0).any():
            raise RuntimeError("black")
        return [f"{sample.shape[0]} frames of {sample.max()}" for sample in pixels]


def test_one_bad_sample_does_not_fail_its_neighbours():
    captioner = Captioner()
    shapes_and_values = [(1, 5), (4, 6), (1, 0), (1, 7), (4, 8)]
    samples = [np.full((frames, 3, 2, 2), value, dtype=np.uint8) for frames, value in shapes_and_values]
    answers = caption_samples(captioner, samples, GenerationSettings())
    assert answers == ["1 frames of 5", "4 frames of 6", None, "1 frames of 7", "4 frames of 8"]
    assert captioner.batches == [3, 1, 1, 1, 2]


def test_exif_orientation_is_honoured():
    backend = Backend()
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 32))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right: left becomes top
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", exif=exif)
    post(backend, buffer.getvalue(), {"Content-Type": "image/png"})
    assert backend.seen[0][0, :, :8].mean() > 200 > 50 > backend.seen[0][0, :, -8:].mean()
