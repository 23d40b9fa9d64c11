"""The serving benchmark's parts at a tiny size: its endless model, the peers' answers, the clients' counts."""

import asyncio
import base64
import json
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from jobs.bench.serve import QUESTION, ServeCase, _body, _in_turns, _result, _Round, _SeparateFigures, _write_bodies
from jobs.bench.serve_load import Load, clients, measure
from jobs.bench.serve_models import write_checkpoint
from jobs.bench.serve_peer import DirectModel, NaiveServer
from tests.media_files import jpeg_bytes
from tests.pipelines.serving.console_server import listening


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "run")


def test_the_peers_answer_alike_and_never_end_early(checkpoint):
    """Or one of them would have less to do."""
    direct, naive = DirectModel(checkpoint), NaiveServer(str(checkpoint))
    for num_tokens in (8, 40):
        words = direct.answer(jpeg_bytes(), QUESTION, num_tokens)
        assert naive._answer(_body(jpeg_bytes(), num_tokens, stream=False)) == words
        assert len(words.split()) == num_tokens  # the demo's tokens are words


class Server:
    """Counts who is in flight; the answers have as many tokens as asked for, or one more."""

    def __init__(self):
        self.in_flight, self.most, self.num_extra, self.streamed = 0, 0, 0, []
        self.http = FastAPI()
        self.http.add_api_route("/chat", self.chat, methods=["POST"])

    async def chat(self, request: Request):
        body = await request.json()
        if body["stream"]:
            return StreamingResponse(self.stream(body["max_tokens"]), media_type="text/event-stream")
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0.02)
        self.in_flight -= 1
        return {"usage": {"completion_tokens": body["max_tokens"] + self.num_extra}}

    async def stream(self, num_tokens):
        self.streamed.append(0)
        place = len(self.streamed) - 1
        for _ in range(num_tokens):
            await asyncio.sleep(0.01)
            self.streamed[place] += 1
            yield "data: {}\n\n"
        yield "data: [DONE]\n\n"


def write_bodies(folder):
    (folder / "plain").write_text(json.dumps({"max_tokens": 3, "stream": False}))
    (folder / "long").write_text(json.dumps({"max_tokens": 10, "stream": True}))
    return str(folder / "plain"), str(folder / "long")


def test_clients_keep_their_number_in_flight_beside_a_stream(tmp_path):
    plain, long = write_bodies(tmp_path)
    server = Server()
    with listening(server.http) as url, clients() as process:
        load = Load(url=f"{url}/chat", bodies=[plain], num_tokens=3, concurrency=4, num_requests=40)
        measured = process.measure(load)
        assert server.most == 4 and len(measured.latencies_s) == 40 and server.streamed == []
        assert measured.seconds >= 10 * 0.02 and min(measured.latencies_s) >= 0.02
        asked = Load(url=load.url, bodies=[plain], num_tokens=3, concurrency=1, num_requests=20, companion=long)
        measured = process.measure(asked)
        assert measured.num_companions >= 2 and server.streamed[0] == 10


def test_a_wrong_number_of_tokens_is_no_answer(tmp_path):
    plain, _ = write_bodies(tmp_path)
    server = Server()
    server.num_extra = 1
    with listening(server.http) as url, pytest.raises(RuntimeError, match="4 tokens instead of 3"):
        asyncio.run(measure(Load(url=f"{url}/chat", bodies=[plain], num_tokens=3, concurrency=1, num_requests=1)))


def test_bodies_are_224_pixel_jpegs_in_chats(tmp_path):
    bodies = _write_bodies(ServeCase(jpegs=2), tmp_path)
    [message] = json.loads(Path(bodies.plain[1]).read_text())["messages"]
    image, text = message["content"]
    data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert data == bodies.images[1] != bodies.images[0] and text["text"] == QUESTION
    assert json.loads(Path(bodies.long).read_text())["max_tokens"] == 256


class Machine:
    """Answers requests and direct calls at once, and remembers which."""

    def __init__(self, tmp_path):
        self.case = ServeCase(jpegs=5, few=6, turn=2)
        self.bodies, self.asked = _write_bodies(self.case, tmp_path), []

    def one(self, url, files, num_tokens, num_requests):
        self.asked += [("served", self.bodies.plain.index(file)) for file in files]
        return [0.0] * num_requests

    def answer(self, image, question, num_tokens):
        self.asked.append(("direct", self.bodies.images.index(image)))


def test_served_requests_and_direct_calls_take_turns(tmp_path):
    machine = Machine(tmp_path)
    served, direct = _in_turns(machine, "url", machine)
    assert len(served) == len(direct) == 6  # and the first turn does not count
    turns = [machine.asked[place : place + 4] for place in range(0, 16, 4)]
    assert turns == [
        [("served", one), ("served", other), ("direct", one), ("direct", other)]
        for one, other in ((3, 4), (0, 1), (2, 3), (4, 0))
    ]


def test_figures_are_medians_over_rounds():
    rounds = [
        _Round(
            ours_rps=30.0 * factor,
            naive_rps=10.0,
            served_p50_s=0.030,
            direct_p50_s=0.020 - 0.001 * factor,
            short_p95_s=0.010,
            short_with_long_p95_s=0.015 * factor,
        )
        for factor in (1, 2, 4)
    ]
    result = _result(rounds, _SeparateFigures(rps=25.0, p50_s=0.050))
    assert result.ratios == pytest.approx({"rps_vs_naive": 6.0, "added_p50_ms": 12.0, "short_p95_ratio": 3.0})
