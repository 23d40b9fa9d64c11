"""The console before the whole service: the demo's frozen models, a bridge with random weights, Ray Serve, Chromium."""

import socket

import pytest

from jobs.bench.serve_models import write_checkpoint
from jobs.serve.job import running_service
from jobs.settings.serve import ServeSettings
from qformer.config import GenerationSettings
from tests.browser import PHONE, chromium, picture_folder
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.pipelines.serving.console_page import ANSWER, NOTE, ask, drop, wait_for, wait_for_text

pytestmark = pytest.mark.slow

NUM_TOKENS = 12
IMAGE = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": jpeg_bytes()}
CLIP = {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": mp4_bytes()}
BROKEN = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": jpeg_bytes()[:2000]}


@pytest.fixture(scope="module")
def url(ray_local, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = tmp_path_factory.mktemp("runs")
    settings = ServeSettings(
        checkpoint=str(write_checkpoint(runs / "demo")),
        adapters={"other": str(write_checkpoint(runs / "other", language=runs / "demo-language", seed=1))},
        port=port,
        generation=GenerationSettings(max_new_tokens=NUM_TOKENS),
    )
    with running_service(settings) as url:
        yield url


@pytest.fixture
def page(url):
    with chromium() as browser:
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(30_000)
        page.goto(url)
        page.locator("#model:enabled").wait_for()
        yield page


def answered(page):
    """The words of the last answer, once it is complete."""
    wait_for_text(page, NOTE, "Cut at the longest length")  # the models of the benchmark never end by themselves
    return page.locator(ANSWER).inner_text().split()


def test_images_clips_turns_adapters_and_refusals(page, tmp_path):
    assert page.locator("#model option").all_inner_texts() == ["demo", "other"]
    drop(page, IMAGE)
    ask(page, "what is in the picture")
    first = answered(page)
    assert len(first) == NUM_TOKENS
    ask(page, "and on the left")
    assert len(answered(page)) == NUM_TOKENS
    page.locator("#new-chat").click()
    page.locator("#model").select_option("other")
    drop(page, IMAGE)
    ask(page, "what is in the picture")
    assert answered(page) != first  # another bridge sees another picture
    page.locator("#new-chat").click()
    drop(page, CLIP)
    ask(page, "what happens")
    assert len(answered(page)) == NUM_TOKENS
    page.screenshot(path=picture_folder(tmp_path) / "phone-real.png")
    drop(page, BROKEN)
    ask(page, "and here")
    wait_for_text(page, ".turn:last-child .failure", "the image cannot be used")


def test_long_answers_stream_and_stop(page):
    page.locator("#open-settings").click()
    page.locator("#max-tokens").fill("400")
    page.keyboard.press("Escape")
    ask(page, "tell me much")
    wait_for(lambda: 0 < len(page.locator(ANSWER).inner_text().split()) < 400, timeout_s=30)
    page.keyboard.press("Escape")
    wait_for_text(page, NOTE, "Stopped.")
    assert len(page.locator(ANSWER).inner_text().split()) < 400
