"""Bodies that travel with the head: each is received whole and once, whichever way it takes."""

import asyncio
import pickle

import pytest
from ray.serve._private.http_util import ASGIReceiveProxy
from starlette.requests import Request

from pipelines.serving.http.body_transfer import (
    MAX_BODY_BYTES,
    ProxyBodyMiddleware,
    ReplicaBodyMiddleware,
    proxy_middlewares,
)

DISCONNECT = {"type": "http.disconnect"}


def part(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def head(length):
    told = [] if length is None else [(b"content-length", str(length).encode())]
    return {"type": "http", "method": "POST", "path": "/", "headers": told}


class Connection:
    """A client: messages, and seconds before each."""

    def __init__(self, *messages):
        self.messages = [*messages]

    async def receive(self):
        if not self.messages:
            await asyncio.Event().wait()
        delay_s, message = self.messages[0]
        await asyncio.sleep(delay_s)
        self.messages.pop(0)
        return message


def passed_on(scope, *messages):
    """Through the proxy's side, a pickle and the replica's side: the scope, the body read there, and what follows."""
    seen = {}

    async def replica(scope, receive, send):
        seen["scope"] = scope
        seen["body"] = await Request(scope, receive).body()
        seen["next"] = await receive()

    async def proxy(scope, receive, send):
        await ReplicaBodyMiddleware(replica)(pickle.loads(pickle.dumps(scope)), receive, send)

    asyncio.run(asyncio.wait_for(ProxyBodyMiddleware(proxy)(scope, Connection(*messages).receive, None), timeout=5))
    return seen


def went_ahead(seen):
    return any(value == seen["body"] for value in seen["scope"].values())


def test_a_body_that_is_there_goes_with_the_head():
    seen = passed_on(head(4), (0, part(b"ab", True)), (0, part(b"cd")), (0.01, DISCONNECT))
    assert seen["body"] == b"abcd" and seen["next"] == DISCONNECT and went_ahead(seen)


@pytest.mark.parametrize(
    ("length", "messages"),
    [
        (4, [(0, part(b"ab", True)), (0.2, part(b"cd"))]),
        (4, [(0.2, part(b"abcd"))]),
        (MAX_BODY_BYTES + 1, [(0, part(b"abcd"))]),
        (None, [(0, part(b"abcd"))]),
    ],
    ids=["half of it late", "all of it late", "large", "of no declared length"],
)
def test_other_bodies_go_the_usual_way(length, messages):
    seen = passed_on(head(length), *messages, (0.01, DISCONNECT))
    assert seen["body"] == b"abcd" and seen["next"] == DISCONNECT and not went_ahead(seen)


@pytest.mark.parametrize("length", ["-3", "four", "4" * 5000])
def test_a_length_that_is_none_is_left_to_the_replica(length):
    scope = head(None) | {"headers": [(b"content-length", length.encode())]}
    seen = passed_on(scope, (0, part(b"abcd")), (0.01, DISCONNECT))
    assert seen["body"] == b"abcd" and not went_ahead(seen)


def test_a_client_that_leaves_before_its_body_is_whole_has_left():
    seen = {}

    async def replica(scope, receive, send):
        seen["scope"] = scope
        seen["messages"] = [await receive(), await receive()]

    client = Connection((0, part(b"ab", True)), (0, DISCONNECT))
    asyncio.run(ProxyBodyMiddleware(replica)(head(4), client.receive, None))
    assert seen["messages"] == [part(b"ab", True), DISCONNECT] and seen["scope"] == head(4)


def test_an_application_that_does_not_look_receives_the_body():
    """As another one behind the same proxy does."""
    seen = []

    async def replica(scope, receive, send):
        seen.append(await Request(scope, receive).body())

    asyncio.run(ProxyBodyMiddleware(replica)(head(4), Connection((0, part(b"abcd"))).receive, None))
    assert seen == [b"abcd"]


@pytest.mark.parametrize("is_ahead", [True, False])
def test_serve_calls_back_for_nothing_that_nobody_waits_for(is_ahead):
    """Serve's own class; the calls are those that its replicas make."""
    calls, seen = [], []

    async def call_back(metadata):
        calls.append(metadata)
        return pickle.dumps([part(b"abcd")] if len(calls) == 1 else [DISCONNECT])

    async def replica(scope, receive, send):
        seen.append(await Request(scope, receive).body())
        await asyncio.sleep(0.01)
        seen.append(len(calls))
        seen.append(await receive())

    async def serve(scope):
        receive = ASGIReceiveProxy(scope, "request", call_back)
        fetching = asyncio.create_task(receive.fetch_until_disconnect())
        await ReplicaBodyMiddleware(replica)(scope, receive, None)
        await fetching

    scope = passed_on(head(4), (0, part(b"abcd")), (0.01, DISCONNECT))["scope"] if is_ahead else head(4)
    asyncio.run(asyncio.wait_for(serve(scope), timeout=5))
    assert seen == [b"abcd", 0 if is_ahead else 2, DISCONNECT] and calls == ["request"] * 2


def test_serve_calls_back_for_nothing_where_nobody_waits_at_all():
    """And what it starts for each request ends with it, as its replicas see to."""

    async def call_back(metadata):
        raise AssertionError("nobody waits")

    async def replica(scope, receive, send):
        assert await Request(scope, receive).body() == b"abcd"
        await asyncio.sleep(0.01)

    async def serve(scope):
        receive = ASGIReceiveProxy(scope, "request", call_back)
        fetching = asyncio.create_task(receive.fetch_until_disconnect())
        await ReplicaBodyMiddleware(replica)(scope, receive, None)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching

    asyncio.run(asyncio.wait_for(serve(passed_on(head(4), (0, part(b"abcd")), (0.01, DISCONNECT))["scope"]), timeout=5))


def test_proxies_are_told_of_it():
    assert [middleware.cls for middleware in proxy_middlewares()] == [ProxyBodyMiddleware]
