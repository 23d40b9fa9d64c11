"""Hostile requests to the HTTP interface over real decoders and models that answer at once; see also the drill."""

import asyncio
import json
import os
import time
from collections import Counter

import httpx
import pytest

from tests.pipelines.serving.answering import Models, api
from tests.pipelines.serving.console_server import listening
from tests.pipelines.serving.hostile_requests import CAPTION, CHAT, JSON_TYPE, hostile_requests
from tests.pipelines.serving.hostile_sockets import (
    NO_HTTP,
    answer_to,
    chat,
    dawdlers,
    hang_up_early,
    hang_up_in_stream,
    trickle,
)
from tests.process_trees import holdings

MAX_BODY_BYTES = 3_000_000
BODY_TIMEOUT_S = 1.0
NUM_CLIENTS = 8
MAX_GROWTH_BYTES = 30 * 2**20
MAX_MORE_FILES = 5


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.fixture(scope="module")
def url(models):
    from pipelines.serving.http.api import build_http

    served = api(models, max_body_bytes=MAX_BODY_BYTES, body_timeout_s=BODY_TIMEOUT_S)
    with listening(build_http(served)) as url:
        yield url


async def refusals(url, requests):
    """Statuses of all requests; each must be refused with a reason."""
    statuses, wrong, waiting = Counter(), [], iter(requests)
    async with httpx.AsyncClient(base_url=url, timeout=60) as session:

        async def client():
            for one in waiting:
                answer = await session.request(one.method, one.path, content=one.body, headers=one.headers)
                statuses[answer.status_code] += 1
                if not (400 <= answer.status_code < 500 and is_explained(answer)):
                    wrong.append((one.name, answer.status_code, answer.text[:200]))

        async with asyncio.TaskGroup() as clients:
            for _ in range(NUM_CLIENTS):
                clients.create_task(client())
    assert wrong == []
    return statuses


def is_explained(answer):
    """In OpenAI's shape, with a message."""
    if not answer.headers["content-type"].startswith("application/json"):
        return False
    error = answer.json().get("error", {})
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"] and error["type"])


def assert_healthy(url):
    """A chat is answered as ever."""
    answer = httpx.post(f"{url}{CHAT}", content=chat("a ball"), headers=JSON_TYPE, timeout=60)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_each_is_refused_and_nothing_is_kept(url):
    requests = list(hostile_requests(1, MAX_BODY_BYTES, search="search"))
    assert len({one.name for one in requests}) == len(requests) > 600
    statuses = asyncio.run(refusals(url, requests))
    assert statuses.total() == len(requests) and {400, 404, 405, 413, 415, 422} <= statuses.keys()
    before = holdings(os.getpid())
    asyncio.run(refusals(url, requests[::4]))
    after = holdings(os.getpid())
    # Of memory, this process also holds what pytest notes of the test itself.
    before[os.getpid()] = 0, before[os.getpid()][1]
    after[os.getpid()] = 0, after[os.getpid()][1]
    assert_no_growth(before, after)
    assert_healthy(url)


def assert_no_growth(before, after):
    """Of processes that were there before: files stay, memory does within what allocators keep."""
    for pid in before.keys() & after.keys():
        (old_bytes, old_files), (new_bytes, new_files) = before[pid], after[pid]
        assert new_files <= old_files + MAX_MORE_FILES, f"process {pid}: {old_files} files, then {new_files}"
        assert new_bytes <= old_bytes + MAX_GROWTH_BYTES, f"process {pid}: {old_bytes} bytes, then {new_bytes}"
    assert len(after) <= len(before), "more processes than before"


@pytest.mark.parametrize("request_", NO_HTTP, ids=range(len(NO_HTTP)))
def test_what_is_no_http(url, request_):
    line = answer_to(url, request_)
    assert line == b"" or line.split()[1].startswith(b"4"), line


def test_slow_bodies_are_given_up_and_slow_heads_hold_nobody_up(url):
    with dawdlers(url, CAPTION, 40) as clients:
        begun_s = time.monotonic()
        assert_healthy(url)
        assert time.monotonic() - begun_s < 5
        assert trickle(clients[0], 10).split()[1] == b"408"


def test_work_for_those_who_hang_up_ends(url, models):
    files = holdings(os.getpid())[os.getpid()][1]
    models.delay_s = 0.2
    try:
        for share in (0.0, 0.5, 0.99):
            hang_up_early(url, CHAT, chat("a ball" * 1000), share)
        ended = models.num_ended
        for _ in range(5):
            assert b"200" in hang_up_in_stream(url, CHAT, chat("a ball", stream=True)).split(b"\r\n")[0]
        deadline_s = time.monotonic() + 10
        while models.num_ended < ended + 5:
            assert time.monotonic() < deadline_s, "the model still works for those who have left"
            time.sleep(0.05)
    finally:
        models.delay_s = 0.0
    assert_healthy(url)
    assert holdings(os.getpid())[os.getpid()][1] <= files + MAX_MORE_FILES


def test_refusals_name_the_field(url):
    """The message helps: it says which of many parts is wrong."""
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    error = httpx.post(f"{url}{CHAT}", content=chat(parts), headers=JSON_TYPE).json()["error"]
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert json.dumps(error)
