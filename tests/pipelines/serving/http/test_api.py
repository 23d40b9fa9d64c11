"""The HTTP layer in one process: answers, deadlines, limits and failures; real decoders, models told how to behave."""

import asyncio
import base64
import io
import json
import os
import signal

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from pipelines.data.media.samples import Limits
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.contract.uploads import Upload
from pipelines.serving.contract.wire import Piece
from pipelines.serving.http.api import build_http
from pipelines.serving.http.keys import make_key
from pipelines.serving.workers.media import DecodePool
from tests.media_files import jpeg_bytes, mp4_bytes, png_bytes
from tests.pipelines.serving.answering import EMBED_DIM, NUM_QUERIES, Models, adapter, api, client, post

IMAGE = {"Content-Type": "image/jpeg"}
VIDEO = {"Content-Type": "video/mp4"}
CHAT = "/v1/chat/completions"


def data_url(data, kind="image/jpeg"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(seed=0):
    return {"type": "image_url", "image_url": {"url": data_url(jpeg_bytes(seed))}}


def video_part(seed=0):
    return {"type": "video_url", "video_url": {"url": data_url(mp4_bytes(seed), "video/mp4")}}


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": [*parts]}


def chat(models, *messages, **fields):
    return post(models, CHAT, json={"messages": [*messages], **fields})


def assert_error(response, status, code, param=None):
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert (error["code"], error["param"]) == (code, param), error


def events(response):
    return [line if line == "[DONE]" else json.loads(line) for line in data_lines(response.text)]


def test_image_and_clip_reach_the_model_as_in_training():
    models = Models()
    assert post(models, "/v1/caption", content=jpeg_bytes(), headers=IMAGE).json() == {
        "caption": "a photo of: a red ball",
        "kind": "image",
        "num_frames": 1,
        "model": "demo/step-00000003",
    }
    models = Models()
    assert post(models, "/v1/caption", content=mp4_bytes(), headers=VIDEO).json()["num_frames"] == 4
    assert [(p.dtype, p.shape) for p in models.pixels] == [(np.uint8, (4, 3, 32, 32))]


def test_exif_orientation_is_honoured():
    models = Models()
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 32))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right: left becomes top
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", exif=exif)
    post(models, "/v1/caption", content=buffer.getvalue(), headers={"Content-Type": "image/png"})
    assert models.pixels[0][0, :, :8].mean() > 200 > 50 > models.pixels[0][0, :, -8:].mean()


@pytest.mark.parametrize(
    ("messages", "segments", "instruction"),
    [
        # One turn: soft prompts, then the instruction, wherever the client put the text.
        ([user(image_part(), text_part("what?"))], ["*", "what?"], "what?"),
        ([user(text_part(" what? "), image_part())], ["*", "what?"], "what?"),
        ([user(text_part("a"), image_part(), text_part("b"), video_part())], ["*", "*", "a b"], "a b"),
        # No text: the prompt of training.
        ([user(image_part())], ["*", "a photo of"], "a photo of"),
        ([{"role": "user", "content": "hello"}], ["hello"], "hello"),
        # The system's text belongs to the first turn's.
        (
            [{"role": "system", "content": "be brief"}, user(image_part(), text_part("what?"))],
            ["*", "be brief what?"],
            "what?",
        ),
        # Several turns, in their order.
        (
            [user(image_part(), text_part("what?")), {"role": "assistant", "content": "red"}, user(text_part("why?"))],
            ["*", "what? red why?"],
            "why?",
        ),
        (
            [user(image_part(), text_part("q")), {"role": "assistant", "content": "a"}, user(image_part())],
            ["*", "q a", "*", "a photo of"],
            "a photo of",
        ),
        (
            [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "a"},
                user(image_part(), text_part("b")),
            ],
            ["hi a", "*", "b"],
            "b",
        ),
    ],
)
def test_conversations(messages, segments, instruction):
    models = Models()
    assert chat(models, *messages).status_code == 200
    [prompt] = models.prompts
    assert [part if isinstance(part, str) else "*" for part in prompt.segments] == segments
    assert set(models.instructions) <= {instruction} and len(models.pixels) == segments.count("*")


def test_media_keep_their_order():
    models = Models()
    answer = chat(models, user(*[image_part(seed) for seed in range(5)], text_part("which?")))
    assert answer.status_code == 200
    means = [part.mean() for part in models.prompts[0].segments[:-1]]
    alone = [Models() for _ in range(5)]
    for seed, one in enumerate(alone):
        chat(one, user(image_part(seed)))
    assert means == pytest.approx([one.prompts[0].segments[0].mean() for one in alone]) and len(set(means)) == 5


def test_generation_fields():
    models = Models()
    turn = user(image_part())
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x", "y"], "max_completion_tokens": 3, "user": "u"}
    chat(models, turn, **fields, n=1, frequency_penalty=0.0, presence_penalty=0, logprobs=False, metadata={"a": "b"})
    chat(models, turn, temperature=0, stop="x", max_tokens=4)
    chat(models, turn)
    chat(models, turn, top_p=0.5)
    got = [prompt.settings for prompt in models.prompts]
    assert [(s.temperature, s.top_p, s.seed, s.stop, s.max_new_tokens) for s in got] == [
        (0.5, 0.9, 7, ("x", "y"), 3),
        (0.0, 1.0, 0, ("x",), 4),
        (0.0, 1.0, 0, (), 32),
        (1.0, 0.5, 0, (), 32),
    ]


def test_a_whole_answer():
    answer = chat(Models(), user(image_part(), text_part("what?")), model="demo").json()
    assert answer["object"] == "chat.completion" and answer["model"] == "demo/step-00000003"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "what?: a red ball", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def test_a_stream():
    models = Models()
    response = chat(models, user(image_part()), stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["total_tokens"] == 12
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert [delta["content"] for delta in deltas[1:-1]] == ["a ", "red ", "ball"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert {chunk["id"] for chunk in chunks} == {usage["id"]} and models.num_ended == 1
    assert not any("usage" in event for event in events(chat(Models(), user(image_part()), stream=True))[:-1])


def test_a_stream_that_breaks_ends_with_an_error_event():
    *chunks, last = events(chat(Models(breaks_after=2), user(image_part()), stream=True))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "a ", "red "]
    assert last["error"]["code"] == "unavailable"
    # Before the first piece there is a status to tell it by.
    assert_error(chat(Models(breaks_after=0), user(image_part()), stream=True), 503, "unavailable")


@pytest.fixture
def records(monkeypatch):
    """Of requests that have ended."""
    ended = []
    monkeypatch.setattr("pipelines.serving.http.records.RequestReporter.end", lambda _, record: ended.append(record))
    return ended


def test_a_stream_is_counted_by_its_end(records):
    chat(Models(), user(image_part()), stream=True)
    chat(Models(breaks_after=2), user(image_part()), stream=True)
    models = Endless(begins=True)

    async def leave():
        async with client(models) as session:
            task = asyncio.create_task(session.post(CHAT, json={"messages": [user(image_part())], "stream": True}))
            await models.thinking.wait()
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(leave())
    assert [(r.status, r.error) for r in records] == [(200, None), (503, "unavailable"), (499, None)]


def test_a_client_that_leaves_while_it_sends_is_no_failure_of_ours(records, caplog):
    async def run():
        chunks = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive():
            return next(chunks)

        async def send(message):
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await build_http(api(Models()))(scope, receive, send)

    asyncio.run(run())
    assert [(r.status, r.error) for r in records] == [(499, "client_closed")] and not caplog.records


def test_the_deadline_holds_within_a_stream():
    async def run():
        async with client(Models(delay_s=0.2), timeout_s=0.7) as session:
            body = {"messages": [user(image_part())], "stream": True}
            return await session.post(CHAT, json=body)

    assert events(asyncio.run(run()))[-1]["error"]["code"] == "timeout"


TURN = user(text_part("hi"))


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_request", "messages"),
        ({"messages": []}, 400, "invalid_request", "messages"),
        ({"messages": "hi"}, 400, "invalid_request", "messages"),
        ({"messages": [TURN], "model": "none"}, 404, "model_not_found", "model"),
        ({"messages": [TURN], "model": "search"}, 400, "wrong_model", "model"),
        ({"messages": [TURN], "model": 3}, 400, "invalid_request", "model"),
        ({"messages": [TURN], "tools": []}, 400, "invalid_request", "tools"),
        ({"messages": [TURN], "max_tokens": "16"}, 400, "invalid_request", "max_tokens"),
        ({"messages": [TURN], "max_tokens": 0}, 400, "invalid_request", "max_tokens"),
        ({"messages": [TURN], "max_tokens": 10**6}, 400, "invalid_request", "max_tokens"),
        ({"messages": [TURN], "max_tokens": True}, 400, "invalid_request", "max_tokens"),
        ({"messages": [TURN], "n": 2}, 400, "invalid_request", "n"),
        ({"messages": [TURN], "temperature": 3}, 400, "invalid_request", "temperature"),
        ({"messages": [TURN], "top_p": 0}, 400, "invalid_request", "top_p"),
        ({"messages": [TURN], "seed": 2**70}, 400, "invalid_request", "seed"),
        ({"messages": [TURN], "stop": ["a"] * 5}, 400, "invalid_request", "stop"),
        ({"messages": [TURN], "stop": [""]}, 400, "invalid_request", "stop"),
        ({"messages": [TURN], "stream_options": {"include_usage": True}}, 400, "invalid_request", "stream_options"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_request", "messages[0].content"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "invalid_request", "messages[0].content"),
        ({"messages": [user(text_part(""))]}, 400, "invalid_request", "messages[0].content[0].text"),
        ({"messages": [user(image_part(), text_part(" "))]}, 400, "invalid_request", "messages[0].content[1].text"),
        ({"messages": [user()]}, 400, "invalid_request", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "invalid_request", "messages[0].content"),
        ({"messages": [user({"type": "image_url"})]}, 400, "invalid_request", "messages[0].content[0].image_url"),
        ({"messages": [user({"type": "sound"})]}, 400, "invalid_request", "messages[0].content[0]"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})]},
            400,
            "invalid_base64",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "https://10.0.0.1/a"}})]},
            403,
            "url_not_allowed",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]},
            400,
            "invalid_url",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "assistant", "content": [image_part()]}, TURN]},
            400,
            "invalid_request",
            "messages[0].content[0]",
        ),
        ({"messages": [TURN] * 100}, 400, "too_many_messages", "messages"),
        (
            {"messages": [user(*[{"type": "image_url", "image_url": {"url": "x"}}] * 1000)]},
            400,
            "too_many_media",
            "messages",
        ),
        ({"messages": [user(text_part("word " * 10_000))]}, 400, "context_length_exceeded", "messages"),
    ],
)
def test_bad_chats(body, status, code, param):
    assert_error(post(Models(), CHAT, json=body), status, code, param)


def test_bad_media():
    cut = {"type": "video_url", "video_url": {"url": data_url(mp4_bytes()[:800], "video/mp4")}}
    assert_error(chat(Models(), user(cut)), 400, "invalid_media", "messages[0].content[0].video_url.url")
    assert_error(post(Models(), "/v1/caption", content=jpeg_bytes()[:2000], headers=IMAGE), 400, "invalid_media")
    bomb = png_bytes((4000, 3000))
    assert_error(post(Models(), "/v1/caption", content=bomb, headers=IMAGE), 422, "media_too_large")
    models = Models(limits=Limits(max_duration_s=0.5))  # the clip has two
    assert_error(post(models, "/v1/caption", content=mp4_bytes(), headers=VIDEO), 422, "media_too_large")
    models = Models(limits=Limits(video_timeout_s=0.01))
    assert_error(post(models, "/v1/caption", content=mp4_bytes(), headers=VIDEO), 422, "media_too_slow")


def test_body_limit_without_declared_length():
    async def endless():
        while True:
            yield bytes(10_000)

    assert_error(post(Models(), "/v1/caption", content=endless(), headers=IMAGE), 413, "body_too_large")


def test_deadlines_of_upload_and_model():
    async def slow():
        while True:
            await asyncio.sleep(0.05)
            yield b"x"

    response = post(Models(), "/v1/caption", content=slow(), headers=IMAGE, body_timeout_s=0.3)
    assert_error(response, 408, "body_timeout")
    response = post(Models(delay_s=5), "/v1/caption", content=jpeg_bytes(), headers=IMAGE, timeout_s=0.5)
    assert_error(response, 504, "timeout")
    assert response.headers["retry-after"] == "1"


def test_too_many_requests_are_refused_and_places_come_back():
    async def run():
        async with client(Models(delay_s=0.5), max_concurrent=2) as session:
            ask = {"content": jpeg_bytes(), "headers": IMAGE}
            first = await asyncio.gather(*[session.post("/v1/caption", **ask) for _ in range(5)])
            second = await session.post("/v1/caption", **ask)
        return first, second

    first, second = asyncio.run(run())
    assert sorted(response.status_code for response in first) == [200, 200, 503, 503, 503]
    refused = [response for response in first if response.status_code == 503]
    assert_error(refused[0], 503, "overloaded")
    assert refused[0].headers["retry-after"] == "1"
    assert second.status_code == 200


def test_failures_of_the_model_tell_nothing_of_our_insides():
    response = post(Models(error=RuntimeError("secret path /x")), "/v1/caption", content=jpeg_bytes(), headers=IMAGE)
    assert_error(response, 500, "internal")
    assert "secret" not in response.text
    gone = Models(error=ApiError(503, "unavailable", "gone", retry_after_s=1))
    assert_error(post(gone, "/v1/caption", content=jpeg_bytes(), headers=IMAGE), 503, "unavailable")


def test_routing_health_models_and_the_openapi_page():
    async def run(models, *paths, method="GET"):
        async with client(models) as session:
            return [await session.request(method, path) for path in paths]

    paths = ("/healthz", "/readyz", "/nowhere", "/v1/caption", "/docs", "/v1/models", "/openapi.json", "/")
    live, ready, missing, wrong, docs, models, page, console = asyncio.run(run(Models(), *paths))
    assert live.json() == ready.json() == {"status": "ok", "model": "demo/step-00000003"}
    assert_error(missing, 404, "not_found")
    assert_error(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert_error(docs, 404, "not_found")
    assert [(m["id"], m["version"], m["tasks"][0]) for m in models.json()["data"]] == [
        ("demo", "demo/step-00000003", "chat"),
        ("search", "search/step-00000003", "embeddings"),
    ]
    assert {"/v1/chat/completions", "/v1/match", "/v1/models/{model}"} <= page.json()["paths"].keys()
    assert console.headers["content-type"].startswith("text/html")
    one, versioned, unknown = asyncio.run(
        run(Models(), "/v1/models/search", "/v1/models/demo/step-00000003", "/v1/models/x")
    )
    assert one.json()["id"] == "search" and versioned.json()["id"] == "demo"
    assert_error(unknown, 404, "model_not_found", "model")
    dead = asyncio.run(run(Models(error=ApiError(503, "unavailable", "dead")), "/healthz", "/readyz"))
    assert dead[0].status_code == 200
    assert_error(dead[1], 503, "unavailable")


def test_probes_share_one_look_at_the_models_and_ask_every_stage():
    class Slow(Models):
        async def decode(self, upload, adapter):
            asked.append(adapter.name)
            return await super().decode(upload, adapter)

    async def ready(served, count=5):
        async def one():
            try:
                return (await served.ready(None))["status"]
            except ApiError as error:
                return error.code

        return await asyncio.gather(*[one() for _ in range(count)])

    async def run(error):
        served = api(Slow(delay_s=0.2, error=error))
        told = [*await ready(served), *await ready(served)]
        served.update([adapter("next")], ())  # what was heard of others tells nothing of it
        return told + await ready(served, 1)

    asked = []
    assert asyncio.run(run(None)) == ["ok"] * 11
    assert sorted(asked) == ["demo", "next", "search"]
    asked.clear()
    assert asyncio.run(run(ApiError(503, "unavailable", "dead"))) == ["unavailable"] * 11
    assert len(asked) == 2


def test_the_openapi_page_shows_requests_that_are_answered_and_what_with():
    def fits(content, value):
        Draft202012Validator({**content["schema"], "components": page["components"]}).validate(value)

    async def run():
        async with client(Models()) as session:
            nonlocal page
            page = (await session.get("/openapi.json")).json()
            for path, method, operation in operations():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                for name, example in content.get("examples", {"": {"value": None}}).items():
                    response = await session.request(method, path.replace("{model}", "demo"), json=example["value"])
                    assert response.status_code == 200, (path, name, response.text)
                    kind = response.headers["content-type"].partition(";")[0]
                    told = operation["responses"]["200"]["content"][kind]
                    if kind == "application/json":
                        fits(told, response.json())
                    else:
                        *chunks, done = events(response)
                        for chunk in [*chunks, *map(json.loads, data_lines(told["example"])[:-1])]:
                            fits({"schema": {"$ref": "#/components/schemas/ChatCompletionChunk"}}, chunk)
                        assert done == data_lines(told["example"])[-1] == "[DONE]"

    def operations():
        return [(path, method, one) for path, methods in page["paths"].items() for method, one in methods.items()]

    page = {}
    asyncio.run(run())
    for path, _, operation in operations():
        assert {"403", "405", "503"} <= operation["responses"].keys(), path
        for status, response in operation["responses"].items():
            fits(told := response["content"]["application/json"], told["example"])
            assert status == "200" or told["example"]["error"]["message"]
    text = json.dumps(page)
    references = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert references <= page["components"]["schemas"].keys()
    assert {"image/*", "video/*"} < page["paths"]["/v1/caption"]["post"]["requestBody"]["content"].keys()


def data_lines(text):
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_embeddings():
    models = Models()
    parts = [text_part("a"), image_part(), text_part("b"), video_part()]
    answer = post(models, "/v1/embeddings", json={"input": parts}).json()
    assert [entry["shape"] for entry in answer["data"]] == [[EMBED_DIM]] * 4 and answer["usage"]["prompt_tokens"] == 26
    assert answer["data"][2]["embedding"] == [0.0, 1.0, *[0.0] * (EMBED_DIM - 2)]
    assert np.linalg.norm(answer["data"][1]["embedding"]) == pytest.approx(1.0)
    queries = post(models, "/v1/embeddings", json={"input": parts, "pooling": "queries", "encoding_format": "base64"})
    entry = queries.json()["data"][3]
    vectors = np.frombuffer(base64.b64decode(entry["embedding"]), dtype=np.float32).reshape(entry["shape"])
    assert vectors.shape == (4 * NUM_QUERIES, EMBED_DIM)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert_error(post(models, "/v1/embeddings", json={"input": ["a", " "]}), 400, "invalid_request", "input")
    assert_error(post(models, "/v1/embeddings", json={"input": ["a"] * 100}), 400, "too_many_inputs", "input")
    assert_error(post(models, "/v1/embeddings", json={"input": [1, 2]}), 400, "invalid_request", "input[0]")
    assert_error(post(models, "/v1/embeddings", json={"input": "a", "model": "demo"}), 400, "wrong_model", "model")
    only = [adapter()]
    response = post(models, "/v1/embeddings", json={"input": "a"}, adapters=only)
    assert_error(response, 404, "model_not_found", "model")


def test_vqa_and_match():
    image = base64.b64encode(jpeg_bytes()).decode()
    models = Models()
    assert post(models, "/v1/vqa", json={"image": image, "question": " how? "}).json() == {
        "answer": "how?: a red ball",
        "kind": "image",
        "num_frames": 1,
        "model": "demo/step-00000003",
    }
    scores = post(models, "/v1/match", json={"image": data_url(jpeg_bytes()), "texts": ["a", "b"]}).json()["scores"]
    assert scores == [{"probability": 1.0, "similarity": 0.5}, {"probability": 0.5, "similarity": 0.5}]
    assert_error(post(models, "/v1/vqa", json={"question": "a"}), 400, "invalid_request", "image")
    both = {"image": image, "video": image, "texts": ["a"]}
    assert_error(post(models, "/v1/match", json=both), 400, "invalid_request", "image")
    assert_error(post(models, "/v1/caption", json={"path": "/etc/passwd"}), 400, "invalid_request", "path")


def test_keys_and_their_limits():
    secret, kept = make_key("alice", requests_per_minute=12)
    other, other_kept = make_key("bob", max_concurrent=1)

    async def run():
        models = Models(delay_s=0.3)
        async with client(models, keys=[kept, other_kept]) as session:
            body = {"messages": [user(text_part("hi"))]}

            def ask(key):
                headers = {} if key is None else {"Authorization": key}
                return session.post(CHAT, json=body, headers=headers)

            refused = [await ask(None), await ask("Bearer wrong"), await ask(f"Basic {secret}"), await ask("Bearer ")]
            alice = [await ask(f"Bearer {secret}") for _ in range(4)]
            bob = await asyncio.gather(*[ask(f"bearer {other}") for _ in range(3)])
            again = await ask(f"Bearer {other}")
            open_pages = [await session.get(path) for path in ("/healthz", "/", "/openapi.json")]
        return refused, alice, bob, again, open_pages

    refused, alice, bob, again, open_pages = asyncio.run(run())
    codes = ["missing_api_key", "invalid_api_key", "missing_api_key", "missing_api_key"]
    for response, code in zip(refused, codes, strict=True):
        assert_error(response, 401, code)
        assert response.headers["www-authenticate"] == "Bearer"
    assert [response.status_code for response in alice] == [200, 200, 429, 429]
    assert_error(alice[-1], 429, "rate_limit_exceeded")
    assert 1 <= int(alice[-1].headers["retry-after"]) <= 5
    assert sorted(response.status_code for response in bob) == [200, 429, 429] and again.status_code == 200
    assert [response.status_code for response in open_pages] == [200, 200, 200]


class Endless(Models):
    """Says one word and thinks for ever about the second; or thinks before the first."""

    def __init__(self, *, begins):
        super().__init__()
        self.begins, self.thinking = begins, asyncio.Event()

    async def soft_prompts(self, adapter, clip, instruction):
        if not self.begins:
            await self.think()
        return await super().soft_prompts(adapter, clip, instruction)

    async def stream(self, prompt):
        try:
            yield Piece(text="a", finish_reason=None, prompt_tokens=1, completion_tokens=1)
            await self.think()
        finally:
            self.num_ended += 1

    async def think(self):
        self.thinking.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.num_ended += 1
            raise


@pytest.mark.parametrize(("begins", "num_ended"), [(True, 2), (False, 1)])
def test_a_client_that_leaves_ends_the_work(begins, num_ended):
    async def run():
        models = Endless(begins=begins)
        async with client(models, max_concurrent=1) as session:
            task = asyncio.create_task(session.post(CHAT, json={"messages": [user(image_part())], "stream": True}))
            await models.thinking.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert models.num_ended == num_ended
            return await session.get("/v1/models")  # its place is free again

    assert asyncio.run(run()).status_code == 200


def test_the_decoder_of_a_client_that_left_is_killed(tmp_path):
    pool = DecodePool(1)
    settings = adapter().decode_settings(Limits(video_timeout_s=60.0))

    async def run():
        await pool.decode(Upload("video", mp4_bytes()), settings)
        decoder = pool._idle.get_nowait()
        pool._idle.put_nowait(decoder)
        [pid] = decoder.videos.child_pids()
        os.kill(pid, signal.SIGSTOP)  # a file that takes for ever
        task = asyncio.create_task(pool.decode(Upload("video", mp4_bytes()), settings))
        other = asyncio.create_task(pool.decode(Upload("video", mp4_bytes()), settings))
        await asyncio.sleep(0.3)
        assert pool.num_waiting == 1
        other.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.num_waiting == 0 and not os.path.exists(f"/proc/{pid}")
        assert len((await pool.decode(Upload("video", mp4_bytes()), settings)).pixels) == 4

    asyncio.run(run())
