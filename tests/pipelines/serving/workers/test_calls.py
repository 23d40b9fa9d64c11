"""Calls to other deployments: what is tried again, what is not, and what a caller that leaves ends."""

import asyncio
import contextlib

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from pipelines.serving.contract.errors import ApiError
from pipelines.serving.workers import calls
from pipelines.serving.workers.calls import MAX_TRIES, call, stream


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_WAIT_S", 0.001)


class Response:
    """What a handle's `remote` gives: a result, an error, items, or nothing for ever."""

    def __init__(self, outcome):
        self.outcome, self.is_cancelled = outcome, False

    def __await__(self):
        if self.outcome == "never":
            yield from asyncio.sleep(60).__await__()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def __aiter__(self):
        for item in self.outcome:
            if item == "never":
                await asyncio.sleep(60)
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """Gives one response after the other."""

    def __init__(self, *outcomes):
        self.responses = [Response(outcome) for outcome in outcomes]
        self.started = []

    def __call__(self):
        self.started.append(self.responses[len(self.started)])
        return self.started[-1]


LOST = [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)]
TASK = RayTaskError("decode", "Traceback", ValueError("a fault of ours"))


async def collected(start):
    items = []
    try:
        async with contextlib.aclosing(stream(start, "x")) as pieces:
            async for item in pieces:
                items.append(item)
    except ApiError as error:
        items.append(error.status)
    return items


def status_of(start):
    with pytest.raises(ApiError) as caught:
        asyncio.run(call(start, "x"))
    return caught.value.status


def test_a_lost_replica_is_retried():
    handle = Handle(*LOST, "answer")
    assert asyncio.run(call(handle, "x")) == "answer" and len(handle.started) == 3


def test_a_request_that_kills_every_replica_is_given_up():
    handle = Handle(*[ActorDiedError() for _ in range(9)])
    assert status_of(handle) == 503 and len(handle.started) == MAX_TRIES


def test_errors_of_our_own_and_full_queues_are_not_retried():
    handle = Handle(TASK, "answer")
    assert status_of(handle) == 500 and len(handle.started) == 1
    handle = Handle(BackPressureError(9, 8), "answer")
    assert status_of(handle) == 503 and len(handle.started) == 1


def test_a_caller_that_leaves_ends_the_call():
    async def run(handle):
        task = asyncio.create_task(call(handle, "x"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle.started[0].is_cancelled

    assert asyncio.run(run(Handle("never")))


def test_a_stream_is_begun_again_only_before_its_first_item():
    handle = Handle([ActorDiedError()], ["a", "b"])
    assert asyncio.run(collected(handle)) == ["a", "b"]
    handle = Handle(["a", ActorDiedError()], ["a", "b"])
    assert asyncio.run(collected(handle)) == ["a", 503] and len(handle.started) == 1
    assert asyncio.run(collected(Handle([TASK]))) == [500]
    assert asyncio.run(collected(Handle(["a", TASK]))) == ["a", 500]


def test_closing_a_stream_ends_its_work():
    async def run(handle):
        pieces = stream(handle, "x")
        assert await anext(pieces) == "a"
        await pieces.aclose()
        return handle.started[0].is_cancelled

    assert asyncio.run(run(Handle(["a", "never"])))
