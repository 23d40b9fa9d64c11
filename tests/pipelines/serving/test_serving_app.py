"""The whole service on Ray Serve with a real (random) captioner, asked over HTTP."""

import base64
import concurrent.futures
import socket

import httpx
import pytest

from jobs.caption import caption_file
from jobs.serve import require_free_port, served
from jobs.settings import ServeSettings
from pipelines.data.samples import DecodeSettings, SampleDecoder
from pipelines.serving.client import ServiceError, request_caption
from qformer.bridge import load_captioner
from qformer.config import GenerationSettings
from qformer.errors import UserError
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.tiny_checkpoints import NUM_FRAMES, write_stage2

MAX_BODY_BYTES = 300_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_stage2(tmp_path_factory.mktemp("runs") / "tiny" / "checkpoints" / "step-00000003")


@pytest.fixture(scope="module")
def url(ray_local, checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServeSettings(
        checkpoint=str(checkpoint),
        port=port,
        max_body_bytes=MAX_BODY_BYTES,
        generation=GenerationSettings(max_new_tokens=8),
    )
    with served(settings) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def offline(checkpoint, tmp_path_factory):
    """Caption as the caption job does."""
    captioner = load_captioner(checkpoint)
    decoder = SampleDecoder(DecodeSettings(preprocessing=captioner.preprocessing, num_frames=captioner.num_frames))
    folder = tmp_path_factory.mktemp("media")

    def caption(name, data):
        path = folder / name
        path.write_bytes(data)
        return caption_file(captioner, decoder, str(path), GenerationSettings(max_new_tokens=8))

    yield caption
    decoder.close()


def post(url, content, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    return httpx.post(f"{url}/v1/caption", content=content, headers=headers, timeout=30)


def assert_error(response, status, kind):
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert response.json()["error"]["type"] == kind


def test_served_caption_equals_offline_caption(url, offline):
    for seed in range(4):
        answer = request_caption(url, jpeg_bytes(seed))
        assert answer == {
            "caption": offline("photo.jpg", jpeg_bytes(seed)),
            "kind": "image",
            "num_frames": 1,
            "model": "tiny/step-00000003",
        }
    for seed in range(2):
        answer = request_caption(url, mp4_bytes(seed))
        assert answer["caption"] == offline("clip.mp4", mp4_bytes(seed))
        assert (answer["kind"], answer["num_frames"]) == ("video", NUM_FRAMES)


def test_captions_differ_between_inputs(offline):
    # Or the equality above would hold for a model that does not look.
    assert len({offline("photo.jpg", jpeg_bytes(seed)) for seed in range(4)}) > 1


def test_concurrent_requests_of_both_kinds_keep_their_answers(url, offline):
    media = [jpeg_bytes(seed) for seed in range(6)] + [mp4_bytes(seed) for seed in range(3)]
    media.insert(3, jpeg_bytes(0)[:2000])  # a broken one among them
    with concurrent.futures.ThreadPoolExecutor(len(media)) as threads:
        answers = list(threads.map(lambda data: post(url, data, "image/*" if data[0] == 0xFF else "video/*"), media))
    assert_error(answers.pop(3), 400, "invalid_media")
    media.pop(3)
    for data, answer in zip(media, answers, strict=True):
        name = "photo.jpg" if data[0] == 0xFF else "clip.mp4"
        assert answer.json()["caption"] == offline(name, data)


def test_json_base64(url, offline):
    for name, data in (("image", jpeg_bytes(1)), ("video", mp4_bytes(1))):
        text = base64.b64encode(data).decode()
        answer = httpx.post(f"{url}/v1/caption", json={name: text}, timeout=30).json()
        assert answer["caption"] == offline(f"media-{name}", data) and answer["kind"] == name
    data_url = "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(1)).decode()
    assert httpx.post(f"{url}/v1/caption", json={"image": data_url}, timeout=30).status_code == 200


def test_errors_are_json(url):
    assert_error(post(url, jpeg_bytes()[:2000], "image/jpeg"), 400, "invalid_media")
    assert_error(post(url, mp4_bytes()[:800], "video/mp4"), 400, "invalid_media")
    assert_error(post(url, b"", "image/jpeg"), 400, "invalid_request")
    assert_error(post(url, b'{"image": "http://127.0.0.1/x.jpg"}', "application/json"), 400, "invalid_request")
    assert_error(post(url, jpeg_bytes(), "text/plain"), 415, "unsupported_media_type")
    assert_error(post(url, jpeg_bytes(), None), 415, "unsupported_media_type")
    assert_error(httpx.get(f"{url}/nowhere"), 404, "not_found")
    assert_error(httpx.get(f"{url}/v1/caption"), 405, "method_not_allowed")


def test_oversize_bodies_are_refused(url):
    assert_error(post(url, bytes(MAX_BODY_BYTES + 1), "image/jpeg"), 413, "body_too_large")

    def undeclared():  # chunked transfer: no Content-Length
        for _ in range(40):
            yield bytes(10_000)

    assert_error(post(url, undeclared(), "image/jpeg"), 413, "body_too_large")
    with pytest.raises(ServiceError, match="413"):
        request_caption(url, bytes(MAX_BODY_BYTES + 1))


def test_health(url):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "model": "tiny/step-00000003"}


def test_a_taken_port_is_the_users_mistake():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="choose another"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
