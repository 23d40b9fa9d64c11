"""Bodies that come with their head also go with it to the replica, which else calls back for them.

Ray Serve's HTTP proxy hands a request over as soon as it has the head; the replica then fetches the body by a call back
to the proxy, some milliseconds that every request waits. `BodyAhead`, in the proxy, adds a body that is small and there
at once to what is handed over; `BodyFromHead`, in the replica, reads it from there and calls back no sooner than
somebody waits for more. Where either is missing (a cluster whose nodes do not name `proxy_middlewares`, another
application behind the same proxy) bodies go Serve's own way.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 256 * 1024
"""Of larger ones, the way is a small part of the work."""

WAIT_S = 0.05
"""For the rest of a body whose head is there; a slow client's is fetched as it comes."""

_BODY = "qformer.body"

_FETCH = "_receive_asgi_messages"
"""Attribute of Serve's `receive` (`ASGIReceiveProxy`): the call back, which it makes whether or not anybody waits."""


class BodyAhead:
    """The proxy's side."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body in the scope and, for whoever does not look there, still to be received."""
        if scope["type"] == "http" and 0 < _declared_bytes(scope) <= MAX_BODY_BYTES:
            messages = await _at_hand(receive)
            if messages and messages[-1]["type"] == "http.request" and not messages[-1].get("more_body"):
                scope = {**scope, _BODY: b"".join(message.get("body", b"") for message in messages)}
            receive = _again(messages, receive)
        await self._app(scope, receive, send)


class BodyFromHead:
    """The replica's side."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what was read ahead is received first, and once."""
        body = scope.get(_BODY)
        await self._app(scope, receive if body is None else _ahead(body, receive), send)


def proxy_middlewares() -> list[Any]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, which Serve's proxies call when they start."""
    return [Middleware(BodyAhead)]


def _declared_bytes(scope: Scope) -> int:
    """0 where the client does not say, or says what is no number."""
    told = dict(scope["headers"]).get(b"content-length", b"")
    return int(told[:20]) if told.isdigit() else 0


async def _at_hand(receive: Receive) -> list[Message]:
    """What of a request comes in time."""
    messages: list[Message] = []
    try:
        async with asyncio.timeout(WAIT_S):
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
    except TimeoutError:
        pass
    return messages


def _again(messages: list[Message], receive: Receive) -> Receive:
    waiting = deque(messages)

    async def receive_again() -> Message:
        return waiting.popleft() if waiting else await receive()

    return receive_again


def _ahead(body: bytes, receive: Receive) -> Receive:
    is_read, fetch_now = False, _put_off(receive)

    async def receive_ahead() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        fetch_now()
        while (message := await receive())["type"] == "http.request":
            pass  # the same body on Serve's own way
        return message

    return receive_ahead


def _put_off(receive: Receive) -> Callable[[], None]:
    """Hold back Serve's calls for messages until the returned function is called: they take time of what computes here.

    Only a streamed answer waits for more than its body, to see its client leave; whatever the answer, the proxy also
    cancels a request whose client has left. Serve starts to call when the application first waits for something, so
    what comes before `BodyFromHead` must not; else it calls as ever.
    """
    fetch = getattr(receive, _FETCH, None)
    is_wanted = asyncio.Event()
    if fetch is not None:

        async def fetch_when_wanted(*args: Any) -> Any:
            await is_wanted.wait()
            return await fetch(*args)

        setattr(receive, _FETCH, fetch_when_wanted)
    return is_wanted.set
