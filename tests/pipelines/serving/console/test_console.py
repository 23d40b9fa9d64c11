"""The console in a real browser, before a model that answers at once."""

import base64
import subprocess
import sys
import time

import pytest

from tests.browser import DESKTOP, PHONE, chromium, picture_folder
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.pipelines.serving.console_page import ANSWER, FAILURE, NOTE, ask, drop, wait_for, wait_for_text
from tests.pipelines.serving.console_server import MAX_BODY_BYTES, MODELS, ToyServer, listening

IMAGE = {"name": "it's a photo.jpg", "mimeType": "image/jpeg", "buffer": jpeg_bytes()}
CLIP = {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": mp4_bytes()}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def toy():
    return ToyServer()


@pytest.fixture(scope="module")
def url(toy):
    with listening(toy.http) as url:
        yield url


@pytest.fixture
def open_page(browser, url, toy):
    """Opens the console; afterwards nothing may have gone against the policy or failed in the page."""
    toy.reset()
    contexts, complaints = [], []

    def open_page(viewport=DESKTOP, address=url, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: "Policy" in message.text and complaints.append(message.text))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def test_dropped_files_are_shown_and_asked_about_and_the_answer_streams(open_page, toy, tmp_path):
    page = open_page()
    drop(page, IMAGE)
    drop(page, CLIP)
    previews = page.locator("#attachments li")
    assert [previews.nth(0).locator("img").count(), previews.nth(1).locator("video").count()] == [1, 1]
    wait_for(lambda: page.evaluate("document.querySelector('#attachments img').naturalWidth") == 200)
    wait_for(lambda: page.evaluate("document.querySelector('#attachments video').videoWidth") == 96)
    page.locator("#model").select_option("clips")
    toy.holds_after = 2
    ask(page, "What is this?")
    wait_for_text(page, ANSWER, "A small")
    assert page.locator(ANSWER).inner_text() == "A small "
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    toy.released.set()
    wait_for_text(page, ANSWER, "A small red circle.")
    page.locator("#send").wait_for()
    page.screenshot(path=picture_folder(tmp_path) / "answered.png")
    [request] = toy.requests
    assert (request["model"], request["stream"]) == ("clips", True)
    assert set(request) == {"model", "stream", "messages"}
    [message] = request["messages"]
    image, clip, text = message["content"]
    assert image == {"type": "image_url", "image_url": {"url": data_url(IMAGE)}}
    assert clip == {"type": "video_url", "video_url": {"url": data_url(CLIP)}}
    assert text == {"type": "text", "text": "What is this?"}


def data_url(file):
    return f"data:{file['mimeType']};base64,{base64.b64encode(file['buffer']).decode()}"


def test_a_conversation_carries_its_answers_and_files(open_page, toy):
    page = open_page()
    drop(page, IMAGE)
    ask(page, "What is this?")
    wait_for_text(page, ANSWER, "circle.")
    toy.fails_after = 1
    ask(page, "This one fails")
    page.locator(FAILURE).wait_for()
    toy.fails_after = None
    ask(page, "And its colour?")
    wait_for_text(page, ANSWER, "circle.")
    messages = toy.requests[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"][0]["image_url"]["url"] == data_url(IMAGE)
    assert [messages[1]["content"], messages[2]["content"]] == ["A small red circle.", "And its colour?"]
    page.locator("#new-chat").click()
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    ask(page, "Anew")
    wait_for_text(page, ANSWER, "circle.")
    assert toy.requests[-1]["messages"] == [{"role": "user", "content": "Anew"}]


def test_settings_travel_along(open_page, toy):
    page = open_page()
    page.locator("#open-settings").click()
    page.locator("#max-tokens").fill("5")
    page.locator("#temperature").fill("0")
    page.keyboard.press("Escape")
    toy.finish = "length"
    ask(page, "Hello")
    wait_for_text(page, NOTE, "Settings")
    assert (toy.requests[0]["max_tokens"], toy.requests[0]["temperature"]) == (5, 0)


def test_escape_stops_the_answer_and_the_server(open_page, toy):
    page = open_page()
    toy.words, toy.pause_s = ["on "] * 1000, 0.05
    ask(page, "Go on")
    wait_for_text(page, ANSWER, "on on")
    page.keyboard.press("Escape")
    wait_for_text(page, NOTE, "Stopped.")
    wait_for(lambda: toy.num_gone == 1)
    assert page.locator("#send").is_visible()
    shown = page.locator(ANSWER).inner_text()
    time.sleep(0.3)
    assert page.locator(ANSWER).inner_text() == shown


def test_without_a_mouse(open_page, toy):
    """Choose a file, ask, stop, set, copy: with the keyboard alone."""
    page = open_page()
    page.on("filechooser", lambda _: None)  # asked for early: the browser is told of it in its own time
    page.locator("#model:enabled").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "attach"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(IMAGE)
    page.locator("#attachments li").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("First line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    toy.pause_s = 0.2
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for()
    assert page.evaluate("document.activeElement.id") == "stop"
    wait_for(lambda: toy.requests)  # else it is stopped before the server hears of it
    page.keyboard.press("Enter")
    wait_for_text(page, NOTE, "Stopped.")
    assert page.evaluate("document.activeElement.id") == "question"
    assert toy.requests[0]["messages"][0]["content"][1]["text"] == "First line\nsecond line"
    page.keyboard.press("Home")
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    wait_for_text(page, ANSWER, "circle.")
    assert walk(page, "send") == ["model", "open-code", "open-settings", "new-chat", "attach", "question", "send"]


RING = "() => [document.activeElement.id, parseFloat(getComputedStyle(document.activeElement).outlineWidth)]"


def walk(page, last):
    """The ids that Tab reaches from the top of the page to `last`; each shows a ring."""
    page.locator(".skip").focus()
    names = []
    while last not in names and len(names) < 20:
        page.keyboard.press("Tab")
        name, ring_px = page.evaluate(RING)
        if name != "scroller":  # what scrolls is reached too, and would frame the whole page
            names.append(name)
            assert ring_px >= 2, name
    return [name for name in names if name]


def test_a_server_that_is_gone_and_comes_back(open_page, toy, tmp_path):
    with listening(toy.http) as address:
        page = open_page(address=address)
        page.locator("#model:enabled").wait_for()
    ask(page, "Anybody there?")
    wait_for_text(page, FAILURE, "The server does not answer.")
    page.screenshot(path=picture_folder(tmp_path) / "gone.png")
    with listening(toy.http, port=int(address.rpartition(":")[2])):
        page.locator(FAILURE).get_by_role("button", name="Try again").click()
        wait_for_text(page, ANSWER, "circle.")
        assert page.locator(FAILURE).is_hidden()
    with listening(toy.http) as address:
        toy.words, toy.pause_s = ["so "] * 100, 0.05
        page = open_page(address=address)
        ask(page, "Talk")
        wait_for_text(page, ANSWER, "so so")
    wait_for_text(page, FAILURE, "before the answer was complete")


REFUSALS = [  # what the server answers, and what the page says of it
    ((400, "bad image"), ["refused", "It says: bad image."]),
    ((403, "no"), ["may not do that", "Enter API key"]),
    ((404, "no model 'x'"), ["does not know this model", "Load models again"]),
    ((413, "too big"), ["too large", "smaller or shorter file"]),
    ((415, "no picture"), ["this kind of file", "Convert it"]),
    ((429, "slow down", {"Retry-After": "7"}), ["no more requests", "wait 7 s"]),
    ((500, "oops"), ["failed", "log"]),
    ((503, "busy", {"Retry-After": "1"}), ["busy", "wait 1 s"]),
    ((504, "late"), ["too long", "shorter"]),
]


def test_refusals_say_what_to_do(open_page, toy):
    page = open_page()
    for refusal, expected in REFUSALS:
        toy.refusal = refusal
        ask(page, "Please")
        for text in [*expected, "Try again"]:
            wait_for_text(page, FAILURE, text)
        assert page.locator(FAILURE).get_attribute("role") == "alert"
    assert page.locator(".failure button").count() == 1  # an earlier question cannot be asked again


def test_answers_that_break_off(open_page, toy):
    page = open_page()
    toy.breaks_after = 2
    ask(page, "One")
    wait_for_text(page, FAILURE, "before the answer was complete")
    toy.breaks_after, toy.ends_after = None, 2
    ask(page, "Two")
    wait_for_text(page, FAILURE, "before the answer was complete")
    toy.ends_after, toy.fails_after = None, 2
    ask(page, "Three")
    wait_for_text(page, FAILURE, "the model failed on this request.")


def test_a_key_is_asked_for_and_kept_in_memory_only(open_page, toy):
    toy.key = "secret"
    page = open_page()
    page.locator("#notice").get_by_role("button", name="Enter API key").click()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Tab")
    wait_for_text(page, "#notice", "valid API key")
    page.locator("#key").fill("secret")
    page.keyboard.press("Enter")
    page.locator("#model:enabled").wait_for()
    assert page.locator("#notice").is_hidden() and not page.locator("#settings").is_visible()
    ask(page, "Hello")
    wait_for_text(page, ANSWER, "circle.")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.locator("#open-code").click()
    assert "secret" not in page.locator("#snippet").inner_text()
    page.reload()
    wait_for_text(page, "#notice", "valid API key")


def test_files_that_cannot_be_sent_are_refused_at_once(open_page, toy):
    page = open_page()
    wait_for_text(page, "#limit-hint", "1.4 MB")
    large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(MAX_BODY_BYTES * 3 // 4)}
    drop(page, large)
    wait_for_text(page, "#refusal", "“large.png” (1.4 MB) is too large")
    drop(page, {"name": "notes.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"})
    wait_for_text(page, "#refusal", "neither an image nor a video")
    assert page.locator("#attachments li").count() == 0
    drop(page, {"name": "film.MKV", "mimeType": "", "buffer": b"a browser that does not know the type"})
    wait_for_text(page, "#attachments", "no preview in this browser")
    assert page.locator("#refusal").is_hidden()
    page.get_by_role("button", name="Remove film.MKV").click()
    page.locator("#send").click()
    wait_for_text(page, "#refusal", "Write a question")
    assert toy.requests == []


def test_what_a_model_says_is_never_markup(open_page, toy):
    page = open_page()
    toy.words = ["<img src=x onerror='document.title=1'>", "<b>bold</b>\n", "&amp; 日本 🙂"]
    ask(page, "<i>hello</i>")
    wait_for_text(page, ANSWER, "日本")
    assert page.locator(ANSWER).inner_text() == "".join(toy.words)
    assert page.locator(".turn img, .turn b, .turn i").count() == 0
    assert page.title() == "qformer console"


TRICKY = "Costs $HOME `id` \\n \"5\"?\nEND\n'quoted' é"


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_shown_code_sends_the_same_request(open_page, toy, tmp_path, language):
    if language == "python":
        pytest.importorskip("openai", reason="the openai client is not installed")
    for file in (IMAGE, CLIP):
        (tmp_path / file["name"]).write_bytes(file["buffer"])
    page = open_page()
    drop(page, IMAGE, CLIP)
    page.locator("#open-settings").click()
    page.locator("#max-tokens").fill("7")
    page.keyboard.press("Escape")
    page.locator("#question").fill(TRICKY)
    page.locator("#open-code").click()
    if language == "python":
        page.keyboard.press("ArrowRight")
    code = page.locator("#snippet").inner_text()
    page.locator("#copy").click()
    wait_for_text(page, "#copied", "opied")
    page.keyboard.press("Escape")
    page.locator("#question").press("Enter")
    wait_for_text(page, ANSWER, "circle.")
    program = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "circle." in done.stdout
    [asked, sent] = toy.requests
    assert sent == asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "viewport"), [("phone", PHONE), ("desktop", DESKTOP)])
def test_pictures_of_every_state_fit_the_screen(open_page, toy, tmp_path, name, viewport, scheme):
    folder = picture_folder(tmp_path)
    page = open_page(viewport, color_scheme=scheme, has_touch=name == "phone")

    def picture(state):
        page.screenshot(path=folder / f"{name}-{scheme}-{state}.png")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
        assert page.locator("#send").bounding_box()["x"] + 40 < viewport["width"]

    page.locator("#model:enabled").wait_for()
    picture("start")
    page.locator("#file").set_input_files([IMAGE, CLIP])
    page.locator("#question").fill("What is in the picture, and what happens in the clip?")
    picture("asking")
    for dialog in ("code", "settings"):
        page.locator(f"#open-{dialog}").click()
        picture(dialog)
        page.keyboard.press("Escape")
    page.locator("#send").click()
    wait_for_text(page, ANSWER, "circle.")
    toy.refusal = (413, "the body exceeds 2000000 bytes")
    ask(page, "And now?")
    page.locator(FAILURE).wait_for()
    wait_for(lambda: page.evaluate("(area => area.scrollHeight - area.scrollTop - area.clientHeight < 2)(scroller)"))
    picture("failed")


PAIRS = [  # text and what it stands on: WCAG asks for 4.5; borders of controls and rings for 3
    ("ink", "page", 4.5),
    ("ink", "tint", 4.5),
    ("quiet", "page", 4.5),
    ("quiet", "surface", 4.5),
    ("quiet", "tint", 4.5),
    ("accent", "surface", 4.5),
    ("accent", "tint", 4.5),
    ("on-accent", "accent", 4.5),
    ("on-accent", "accent-hover", 4.5),
    ("danger", "danger-tint", 4.5),
    ("ink", "danger-tint", 4.5),
    ("edge", "surface", 3),
    ("edge", "page", 3),
    ("accent", "page", 3),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme)
    for front, back, least in PAIRS:
        colours = page.evaluate(
            "names => names.map(name => getComputedStyle(document.documentElement).getPropertyValue('--' + name))",
            [front, back],
        )
        lighter, darker = sorted(map(luminance, colours), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= least, (front, back)


def luminance(colour):
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    channels = [int(colour.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_models_are_listed(open_page):
    page = open_page()
    page.locator("#model:enabled").wait_for()
    assert page.locator("#model option").all_inner_texts() == list(MODELS)
