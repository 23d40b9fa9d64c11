"""Transfer of small request bodies from Ray Serve's proxy to the replica together with the headers.

Ray Serve's HTTP proxy forwards a request as soon as it has the headers; the replica then fetches the body with a call
back to the proxy, which costs every request some milliseconds. `ProxyBodyMiddleware`, in the proxy, attaches a small
body that arrives with the headers to the forwarded request. `ReplicaBodyMiddleware`, in the replica, reads it there and
calls back only when the application waits for further messages. Where either is missing (a cluster whose nodes do not
set `proxy_middlewares`, another application behind the same proxy) bodies go Serve's own way.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 256 * 1024
"""Size limit of attached bodies; for larger ones, the call back is a small part of the cost."""

WAIT_S = 0.05
"""Longest wait for a body after its headers; a slower body goes Serve's own way."""

_BODY = "qformer.body"

_FETCH = "_receive_asgi_messages"
"""Attribute of Serve's `receive` (`ASGIReceiveProxy`): the call back, which Serve makes even if nothing waits."""


class ProxyBodyMiddleware:
    """ASGI middleware of the proxy: attaches a small body to the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request with its body in the scope; `receive` still gives the body to other applications."""
        if scope["type"] == "http" and 0 < _declared_bytes(scope) <= MAX_BODY_BYTES:
            messages = await _receive_body(receive)
            if messages and messages[-1]["type"] == "http.request" and not messages[-1].get("more_body"):
                scope = {**scope, _BODY: b"".join(message.get("body", b"") for message in messages)}
            receive = _replay(messages, receive)
        await self._app(scope, receive, send)


class ReplicaBodyMiddleware:
    """ASGI middleware of the replica: reads an attached body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request; `receive` gives the attached body first, and once."""
        body = scope.get(_BODY)
        await self._app(scope, receive if body is None else _receive_attached(body, receive), send)


def proxy_middlewares() -> list[Any]:
    """Middlewares of Serve's proxies, which call this at their start (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(ProxyBodyMiddleware)]


def _declared_bytes(scope: Scope) -> int:
    """Value of Content-Length; 0 if it is missing or no number."""
    value = dict(scope["headers"]).get(b"content-length", b"")
    return int(value[:20]) if value.isdigit() else 0


async def _receive_body(receive: Receive) -> list[Message]:
    """Messages of a request that arrive within `WAIT_S`."""
    messages: list[Message] = []
    try:
        async with asyncio.timeout(WAIT_S):
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
    except TimeoutError:
        pass
    return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    waiting = deque(messages)

    async def receive_replayed() -> Message:
        return waiting.popleft() if waiting else await receive()

    return receive_replayed


def _receive_attached(body: bytes, receive: Receive) -> Receive:
    is_read, fetch_now = False, _defer_fetch(receive)

    async def receive_attached() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        fetch_now()
        while (message := await receive())["type"] == "http.request":
            pass  # the same body, by Serve's call back
        return message

    return receive_attached


def _defer_fetch(receive: Receive) -> Callable[[], None]:
    """Delay Serve's call back until the returned function is called, because it takes CPU time from the models.

    Only a streamed answer waits for more than its body, to notice that its client disconnects; for every answer, the
    proxy also cancels the request of a client that disconnects. Serve starts the call back when the application first
    awaits something, so middlewares outside of `ReplicaBodyMiddleware` must not await before they call it.
    """
    fetch = getattr(receive, _FETCH, None)
    is_wanted = asyncio.Event()
    if fetch is not None:

        async def fetch_when_wanted(*args: Any) -> Any:
            await is_wanted.wait()
            return await fetch(*args)

        setattr(receive, _FETCH, fetch_when_wanted)
    return is_wanted.set
