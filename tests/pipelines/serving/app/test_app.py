"""The whole service on Ray Serve with real (random) models, asked by OpenAI's client and over plain HTTP."""

import base64
import concurrent.futures
import contextlib
import json
import re
import shutil
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from ray import serve
from safetensors.torch import load_file, save_file

from jobs.serve.job import reload, require_free_port, require_protection, resolve_service, running_service
from jobs.settings.serve import ServeSettings
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.storage.checkpoint_folders import write_marker
from pipelines.inference.files import caption_file
from pipelines.inference.models import load_captioner, load_retriever
from pipelines.serving.app.client import ServiceError, request_caption
from pipelines.serving.contract.config import RequestLimits, Scale
from pipelines.serving.http.body_transfer import MAX_BODY_BYTES as MAX_AHEAD_BYTES
from qformer.config import GenerationSettings
from qformer.errors import UserError
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.metrics_endpoint import endpoints
from tests.tiny_checkpoints import NUM_FRAMES, TEXT, write_stage1, write_stage2

MAX_BODY_BYTES = 300_000
GREEDY = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A dozen adapters over one language model, one of which reads its instruction, and a retriever."""
    runs = tmp_path_factory.mktemp("runs")
    first = write_stage2(runs / "tiny" / "checkpoints" / "step-00000003")
    language = first.with_name(first.name + "-language")
    return {
        "tiny": first,
        "other": write_stage2(runs / "other", language=language, seed=5),
        "reader": write_stage2(runs / "reader", language=language, seed=6, reads_prompt=True),
        "search": write_stage1(runs / "search" / "checkpoints" / "step-00000003"),
        **{f"more-{seed}": write_stage2(runs / f"more-{seed}", language=language, seed=seed) for seed in range(10, 19)},
    }


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["apart", "fused"])
def settings(checkpoints, request):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ServeSettings(
        checkpoint=str(checkpoints["tiny"].parents[1]),
        adapters={name: str(folder) for name, folder in checkpoints.items() if name != "tiny"},
        port=port,
        requests=RequestLimits(max_body_bytes=MAX_BODY_BYTES, body_timeout_s=4.0),
        max_loaded_adapters=2,  # of 13: they come and go
        generation=GREEDY,
        fused=request.param,
    )


@pytest.fixture(scope="module")
def url(ray_local, settings):
    with running_service(settings) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def offline(checkpoints, tmp_path_factory):
    """Answer as the caption job does."""
    captioners = {name: load_captioner(folder) for name, folder in checkpoints.items() if name != "search"}
    one = captioners["tiny"]
    decoder = SampleDecoder(DecodeSettings(preprocessing=one.preprocessing, num_frames=one.num_frames))
    path = tmp_path_factory.mktemp("media") / "media"

    def answer(data, instruction="", name="tiny"):
        path.write_bytes(data)
        return caption_file(captioners[name], decoder, str(path), GREEDY, instruction)

    yield answer
    decoder.close()


def data_url(data):
    kind = "image/jpeg" if data[0] == 0xFF else "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(data):
    name = "image_url" if data[0] == 0xFF else "video_url"
    return {"type": name, name: {"url": data_url(data)}}


def user(*media, text=None):
    return {"role": "user", "content": [*map(part, media), *([{"type": "text", "text": text}] if text else [])]}


def ask(client, data, text=None, model="tiny", **fields):
    answer = client.chat.completions.create(model=model, messages=[user(data, text=text)], temperature=0, **fields)
    return answer.choices[0].message.content


def post(url, content, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    return httpx.post(f"{url}/v1/caption", content=content, headers=headers, timeout=30)


def assert_error(response, status, code):
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert response.json()["error"]["code"] == code


def test_served_caption_equals_offline_caption(url, offline):
    for seed in range(3):
        assert request_caption(url, jpeg_bytes(seed)) == {
            "caption": offline(jpeg_bytes(seed)),
            "kind": "image",
            "num_frames": 1,
            "model": "tiny/step-00000003",
        }
    answer = request_caption(url, mp4_bytes(0))
    assert answer["caption"] == offline(mp4_bytes(0))
    assert (answer["kind"], answer["num_frames"]) == ("video", NUM_FRAMES)


def test_captions_differ_between_inputs_adapters_and_instructions(offline):
    # Or the equalities would hold for a model that does not look.
    assert len({offline(jpeg_bytes(seed)) for seed in range(4)}) > 1
    assert len({offline(jpeg_bytes(0), name=name) for name in ("tiny", "other", "reader")}) > 1
    assert len({offline(jpeg_bytes(0), text, "reader") for text in TEXT.split()}) > 1


def test_chats_equal_the_offline_path_alone_and_in_mixed_batches(client, offline):
    questions = [
        (data, text, name)
        for data in (jpeg_bytes(0), jpeg_bytes(1), mp4_bytes(0))
        for text in (None, "red circle left of")
        for name in ("tiny", "other", "reader")
    ]
    expected = [offline(data, text or "", name) for data, text, name in questions]
    assert ask(client, *questions[3]) == expected[3] and ask(client, *questions[-1]) == expected[-1]
    with concurrent.futures.ThreadPoolExecutor(len(questions)) as threads:
        answers = list(threads.map(lambda question: ask(client, *question), questions))
    assert answers == expected


def test_a_dozen_adapters_take_turns_in_two_places(client, offline, checkpoints):
    """Asked all at once, each pushes others out of the memory of the replica, which loads them again."""
    names = [name for name in checkpoints if name != "search"]
    expected = [offline(jpeg_bytes(1), "red", name) for name in names]
    assert len(names) == 12 and len(set(expected)) > 1
    with concurrent.futures.ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(lambda name: ask(client, jpeg_bytes(1), "red", name), 2 * names))
    assert answers == 2 * expected


def test_a_stream_is_the_whole_answer_and_counts_its_tokens(client, offline):
    messages = [user(jpeg_bytes(2), text="blue")]
    chunks = list(
        client.chat.completions.create(
            model="other", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == offline(jpeg_bytes(2), "blue", "other")
    whole = client.chat.completions.create(model="other", messages=messages, temperature=0)
    # Four soft prompts, the leading token and a word.
    assert chunks[-1].usage == whole.usage and whole.usage.prompt_tokens == 6 and whole.usage.completion_tokens > 0
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])


def test_several_turns_and_media_follow_the_documented_template(client, checkpoints):
    captioner = load_captioner(checkpoints["tiny"])
    decoder = SampleDecoder(DecodeSettings(preprocessing=captioner.preprocessing, num_frames=captioner.num_frames))
    first, second = (torch.tensor(decoder.decode(kind="image", data=jpeg_bytes(n)).pixels)[None] for n in (1, 2))
    clip = torch.tensor(decoder.decode(kind="video", data=mp4_bytes(0)).pixels)[None]
    decoder.close()
    rows = torch.cat([captioner.soft_prompts(first)[0], captioner.soft_prompts(second)[0]])
    expected = captioner.language.generate([rows], ["red circle"], GREEDY)[0]
    one_turn = client.chat.completions.create(
        model="tiny", messages=[user(jpeg_bytes(1), jpeg_bytes(2), text="red circle")], temperature=0
    )
    assert one_turn.choices[0].message.content == expected
    expected = captioner.language.generate(captioner.soft_prompts(first), ["red circle blue left"], GREEDY)[0]
    turns = [user(jpeg_bytes(1), text="red"), {"role": "assistant", "content": "circle"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[*turns, {"role": "user", "content": "blue left"}], temperature=0
    )
    assert answer.choices[0].message.content == expected
    expected = captioner.language.generate(captioner.soft_prompts(clip), ["red circle blue left"], GREEDY)[0]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[user(mp4_bytes(0), text="red"), *turns[1:], {"role": "user", "content": "blue left"}],
        temperature=0,
    )
    assert answer.choices[0].message.content == expected and answer.usage.prompt_tokens > 4 * NUM_FRAMES


def test_generation_is_asked_for(client):
    def sampled(seed):
        return ask_sampled(client, seed)

    assert sampled(1) == sampled(1) and len({sampled(seed) for seed in range(6)}) > 1
    text = ask(client, jpeg_bytes(0), "red", max_tokens=3)
    assert len(text.split()) <= 3
    words = ask(client, jpeg_bytes(1)).split()
    if len(words) > 1:
        assert ask(client, jpeg_bytes(1), stop=[words[1]]) == words[0]


def ask_sampled(client, seed):
    answer = client.chat.completions.create(
        model="tiny", messages=[user(jpeg_bytes(0))], temperature=2.0, top_p=1.0, seed=seed, max_tokens=8
    )
    return answer.choices[0].message.content


def test_the_client_gets_errors_of_its_own_kinds(client):
    with pytest.raises(openai.NotFoundError, match="'tiny', 'other', 'reader'") as missing:
        ask(client, jpeg_bytes(0), model="nobody")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as cut:
        ask(client, jpeg_bytes(0)[:2000])
    assert (cut.value.code, cut.value.param) == ("invalid_media", "messages[0].content[0].image_url.url")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, jpeg_bytes(0), "red " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens=8; 128 is the most"):
        client.chat.completions.create(model="tiny", messages=[user(jpeg_bytes(0), text="red " * 500)], stream=True)
    with pytest.raises(openai.PermissionDeniedError):
        message = {"type": "image_url", "image_url": {"url": "https://169.254.169.254/latest"}}
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [message]}])


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()][:4] == ["tiny", "other", "reader", "search"]
    assert client.models.retrieve("search").id == "search"


def test_embeddings_and_matches_equal_the_offline_path(client, url, checkpoints):
    retriever = load_retriever(checkpoints["search"])
    decoder = SampleDecoder(DecodeSettings(preprocessing=retriever.preprocessing, num_frames=retriever.num_frames))
    pixels = torch.tensor(decoder.decode(kind="image", data=jpeg_bytes(3)).pixels)[None]
    decoder.close()
    embeds_1NE, tokens = retriever.embed_image(pixels)
    texts = ["red circle", "blue square left"]
    found = client.embeddings.create(model="search", input=texts)  # base64, as the client asks for by itself
    np.testing.assert_allclose([one.embedding for one in found.data], retriever.embed_text(texts), atol=1e-6)
    queries = client.embeddings.create(
        model="search", input=[part(jpeg_bytes(3))], extra_body={"pooling": "queries"}, encoding_format="float"
    )
    assert queries.data[0].shape == list(embeds_1NE.shape[1:])
    np.testing.assert_allclose(queries.data[0].embedding, embeds_1NE.flatten(), atol=1e-5)
    body = {"image": data_url(jpeg_bytes(3)), "texts": texts}
    scores = httpx.post(f"{url}/v1/match", json=body, timeout=30).json()["scores"]
    probabilities = retriever.match(tokens.expand(2, -1, -1, -1), texts)
    np.testing.assert_allclose([score["probability"] for score in scores], probabilities, atol=1e-5)
    similarity = (retriever.embed_text(texts) @ embeds_1NE[0].T).amax(dim=1)
    np.testing.assert_allclose([score["similarity"] for score in scores], similarity, atol=1e-5)


def test_one_broken_file_among_many_fails_alone(url, offline):
    media = [jpeg_bytes(seed) for seed in range(6)] + [mp4_bytes(seed) for seed in range(2)]
    media.insert(3, jpeg_bytes(0)[:2000])
    with concurrent.futures.ThreadPoolExecutor(len(media)) as threads:
        answers = list(threads.map(lambda data: post(url, data, "image/*" if data[0] == 0xFF else "video/*"), media))
    assert_error(answers.pop(3), 400, "invalid_media")
    media.pop(3)
    for data, answer in zip(media, answers, strict=True):
        assert answer.json()["caption"] == offline(data)


def test_json_base64(url, offline):
    for name, data in (("image", jpeg_bytes(1)), ("video", mp4_bytes(1))):
        text = base64.b64encode(data).decode()
        answer = httpx.post(f"{url}/v1/caption", json={name: text}, timeout=30).json()
        assert answer["caption"] == offline(data) and answer["kind"] == name
    body = {"image": data_url(jpeg_bytes(1)), "question": "red left", "model": "reader"}
    assert httpx.post(f"{url}/v1/vqa", json=body, timeout=30).json()["answer"] == offline(
        jpeg_bytes(1), "red left", "reader"
    )


def test_a_page_of_another_site_may_not_ask(url):
    """Its name may lead here, but the browser tells it."""
    address = httpx.URL(url)
    for path in ("/v1/models", "/"):
        assert_error(
            httpx.get(f"{url}{path}", headers={"Host": f"evil.example:{address.port}"}), 403, "host_not_allowed"
        )
        assert httpx.get(f"{url}{path}", headers={"Host": f"localhost:{address.port}"}).status_code == 200


def test_oversize_bodies_are_refused(url):
    assert_error(post(url, bytes(MAX_BODY_BYTES + 1), "image/jpeg"), 413, "body_too_large")

    def undeclared():  # chunked transfer: no Content-Length
        for _ in range(40):
            yield bytes(10_000)

    assert_error(post(url, undeclared(), "image/jpeg"), 413, "body_too_large")
    with pytest.raises(ServiceError, match="413"):
        request_caption(url, bytes(MAX_BODY_BYTES + 1))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_work_for_a_client_that_left_stops(url, ray_local, is_streamed):
    """The engine counts what it drops. An answer may end before its client is known to be gone: not all of them do."""
    body = {"messages": [user(jpeg_bytes(0))], "stream": is_streamed, "max_tokens": 100, "temperature": 2.0}
    counted = re.compile(r"ray_qformer_serve_cancelled_total\{.*\} [1-9].*")
    before, end_s, seed = set(counted.findall(endpoints(ray_local))), time.monotonic() + 60, 0
    while not set(counted.findall(endpoints(ray_local))) - before:
        assert time.monotonic() < end_s
        seed += 1
        timeout = httpx.Timeout(30, read=30 if is_streamed else 0.02 * (1 + seed % 10))
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "seed": seed}, timeout=timeout) as reply,
        ):
            next(reply.iter_lines())
        time.sleep(0.3)


def test_clients_that_send_slowly_hold_up_nobody(url):
    address = httpx.URL(url)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            silent = stack.enter_context(socket.create_connection((address.host, address.port)))
            silent.sendall(b"POST /v1/caption HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        slow = stack.enter_context(socket.create_connection((address.host, address.port)))
        slow.sendall(
            b"POST /v1/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n\xff"
        )
        assert post(url, jpeg_bytes(0), "image/jpeg").status_code == 200
        slow.settimeout(30)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_figures_and_logs_tell_of_requests_and_not_what_was_asked(url, client, ray_local):
    secret = "circle moving above"
    ask(client, jpeg_bytes(4), secret, model="other")
    wanted = [
        f"ray_qformer_serve_{name}" for name in ("requests_total", "tokens_total", "encoder_batch", "media_queue")
    ]
    wanted.append("ray_qformer_serve_time_to_first_token_p95_s")
    end_s = time.monotonic() + 30
    while not all(name in (text := endpoints(ray_local)) for name in wanted) and time.monotonic() < end_s:
        time.sleep(1)
    assert re.search(r'ray_qformer_serve_requests_total\{.*adapter="other".*status="200".*\} [1-9]', text)
    assert re.search(r'ray_qformer_serve_tokens_total\{.*adapter="other".*kind="completion".*\} [1-9]', text)
    logs = Path(ray_local._private.worker._global_node.get_session_dir_path(), "logs")
    lines = [line for file in logs.glob("serve/replica_*Ingress*") for line in file.read_text().splitlines()]
    told = [entry for entry in map(json.loads, lines) if entry.get("endpoint") == "/v1/chat/completions"]
    last = [entry for entry in told if entry["adapter"] == "other/other" or entry["adapter"] == "other"][-1]
    assert (last["status"], last["num_media"], last["num_frames"]) == (200, 1, 1)
    assert last["completion_tokens"] > 0 and last["stages_s"].keys() == {"received", "decoded", "encoded"}
    image = data_url(jpeg_bytes(4))[-60:]
    for file in logs.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert secret.encode() not in content and image.encode() not in content, file


def test_health_readiness_page_and_routing(url):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "model": "tiny/step-00000003"}
    assert httpx.get(f"{url}/readyz", timeout=30).json()["status"] == "ok"
    assert "<html" in httpx.get(f"{url}/").text
    assert json.loads(httpx.get(f"{url}/openapi.json").text)["openapi"] == "3.1.0"
    assert_error(httpx.get(f"{url}/nowhere"), 404, "not_found")
    assert_error(httpx.get(f"{url}/v1/caption"), 405, "method_not_allowed")


def test_a_small_body_reaches_a_replica_with_its_head(url):
    @serve.deployment
    class Listener:
        async def __call__(self, request):
            ahead = [value for value in request.scope.values() if isinstance(value, bytes) and value[:1] == b"!"]
            return {"ahead": len(ahead[0]) if ahead else 0, "received": len(await request.body())}

    serve.run(Listener.bind(), name="listener", route_prefix="/listener")
    try:
        for size, ahead in ((50_000, 50_000), (MAX_AHEAD_BYTES + 1, 0)):
            answer = httpx.post(f"{url}/listener", content=b"!" * size, timeout=60).json()
            assert answer == {"ahead": ahead, "received": size}
    finally:
        serve.delete("listener")


def test_a_newer_checkpoint_is_taken_while_requests_go_on(client, checkpoints, settings, tmp_path):
    """The last test on this service; drills do the same under load."""
    language = checkpoints["tiny"].with_name(checkpoints["tiny"].name + "-language")
    before = resolve_service(settings)
    useless = write_stage2(checkpoints["tiny"].with_name("step-00000004"), language=language)
    weights = load_file(useless / "bridge.safetensors")
    weights.pop("language_projection.bias")
    save_file(weights, useless / "bridge.safetensors")
    (useless / "complete.json").unlink()
    write_marker(useless, {"step": 4})  # whole, and yet nothing that can be loaded
    with pytest.raises(UserError, match="tiny/step-00000004 at .* does not answer"):
        reload(before, resolve_service(settings))
    assert request_answer(client).model == "tiny/step-00000003"
    newer = write_stage2(checkpoints["tiny"].with_name("step-00000005"), language=language, seed=9)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        updating = thread.submit(reload, before, resolve_service(settings))
        while not updating.done():
            ask(client, jpeg_bytes(0))
        updating.result()
    end_s = time.monotonic() + 30
    while (answer := request_answer(client)).model != "tiny/step-00000005":
        assert answer.model == "tiny/step-00000003" and time.monotonic() < end_s
        time.sleep(0.2)
    captioner = load_captioner(newer)
    decoder = SampleDecoder(DecodeSettings(preprocessing=captioner.preprocessing, num_frames=captioner.num_frames))
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg_bytes(0))
    assert answer.choices[0].message.content == caption_file(captioner, decoder, str(path), GREEDY)
    decoder.close()
    for folder in (useless, newer):
        shutil.rmtree(folder)  # the next service begins as this one did


def request_answer(client):
    return client.chat.completions.create(model="tiny", messages=[user(jpeg_bytes(0))], temperature=0)


def test_a_taken_port_is_the_users_mistake():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="choose another"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.3", "::", "example.org"])
def test_nobody_opens_a_service_by_accident(host):
    with pytest.raises(UserError, match="without API keys"):
        require_protection(ServeSettings(checkpoint="run", host=host))
    require_protection(ServeSettings(checkpoint="run", host=host, api_keys="keys.json"))
    require_protection(ServeSettings(checkpoint="run", host=host, allow_open=True))
    require_protection(ServeSettings(checkpoint="run", host="::1"))


def test_bounds_that_cross_are_refused():
    with pytest.raises(ValueError, match="min_replicas=3 and max_replicas=2"):
        Scale(min_replicas=3, max_replicas=2)
