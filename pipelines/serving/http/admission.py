"""The frame around every request: who asks, whether there is room, how long it may take, what is told of it after."""

import asyncio
import contextlib
import itertools
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pipelines.serving.contract.config import ApiKey, RequestLimits
from pipelines.serving.contract.errors import RETRY_AFTER_S, ApiError, error_response, internal_error
from pipelines.serving.http.keys import KeyRing
from pipelines.serving.http.records import Record, Reporter
from pipelines.serving.workers.graph import Models

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SPARE_S = 30.0
"""A place that was not given back, for whatever reason, is free so long after the deadline."""


class Context:
    """One request in work.

    Args:
        record: What will be told of it.
        deadline_s: On the event loop's clock.
    """

    def __init__(self, record: Record, deadline_s: float) -> None:
        self.record, self.deadline_s = record, deadline_s
        self.stack = contextlib.AsyncExitStack()
        """Closed when the request has ended; a streamed answer takes it over."""

    def keep(self) -> contextlib.AsyncExitStack:
        """Hand what is to be closed to a streamed answer."""
        return self.stack.pop_all()


class StreamedAnswer(StreamingResponse):
    """Server-sent events; closes `stack` however the answer ends, also when it never begins."""

    def __init__(self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


Handler = Callable[[Request, Context], Awaitable[Any]]


class Gate:
    """Lets requests in.

    Args:
        limits: Of one request, and of how many at a time.
        models: Keep the quotas.
        reporter: Is told of every request.
    """

    def __init__(self, limits: RequestLimits, models: Models, reporter: Reporter) -> None:
        self.limits, self._models, self._reporter = limits, models, reporter
        self.keys = KeyRing()
        self._places: dict[int, float] = {}
        self._numbers = itertools.count()
        self._returning: set[asyncio.Task[None]] = set()

    async def run(self, request: Request, route: str, handler: Handler) -> Response:
        """Answer a request: `handler`'s JSON or response, or why there is none."""
        context = self._context(request, route)
        record = context.record
        async with context.stack:
            context.stack.callback(self._reporter.end, record)
            response = await self._answer(request, context, handler)
            if not isinstance(response, StreamedAnswer):  # which tells at its end
                record.status = response.status_code
        response.headers[REQUEST_ID_HEADER] = record.id
        return response

    async def _answer(self, request: Request, context: Context, handler: Handler) -> Response:
        record = context.record
        try:
            async with asyncio.timeout_at(context.deadline_s):
                key = self.keys.identify(request.headers.get("authorization"))
                record.key = None if key is None else key.name
                self._take_place(context)
                if key is not None and (key.requests_per_minute or key.max_concurrent):
                    await self._take_quota(key, context)
                answer = await handler(request, context)
            return answer if isinstance(answer, Response) else JSONResponse(answer)
        except ApiError as error:
            refused = error
        except TimeoutError:
            message = f"the request took longer than {self.limits.timeout_s:g} s; ask for less, or try again"
            refused = ApiError(504, "timeout", message, retry_after_s=RETRY_AFTER_S)
        except ClientDisconnect:
            refused = ApiError(499, "client_closed", "the client left before its request was whole")
        except Exception:
            logger.exception("request %s failed", record.id)
            refused = internal_error()
        record.error = refused.code
        return error_response(refused.refusal)

    def _context(self, request: Request, route: str) -> Context:
        told = request.headers.get(REQUEST_ID_HEADER, "")
        name = told if _GOOD_ID.fullmatch(told) else uuid.uuid4().hex
        deadline_s = asyncio.get_running_loop().time() + self.limits.timeout_s
        return Context(Record(name, route), deadline_s)

    def _take_place(self, context: Context) -> None:
        """Counted without a lock, as all requests share one event loop."""
        now_s = time.monotonic()
        if len(self._places) >= self.limits.max_concurrent:
            self._places = {place: end_s for place, end_s in self._places.items() if end_s > now_s}
        if len(self._places) >= self.limits.max_concurrent:
            message = "too many requests in work; try again"
            raise ApiError(503, "overloaded", message, retry_after_s=RETRY_AFTER_S)
        place = next(self._numbers)
        self._places[place] = now_s + self.limits.timeout_s + _SPARE_S
        self._reporter.count(len(self._places))
        context.stack.callback(self._leave_place, place)

    def _leave_place(self, place: int) -> None:
        self._places.pop(place, None)
        self._reporter.count(len(self._places))

    async def _take_quota(self, key: ApiKey, context: Context) -> None:
        lease = await self._models.take_quota(key)

        def give_back() -> None:
            # In a task of its own: this one may be cancelled, as its client is gone.
            task = asyncio.create_task(self._models.give_quota(key, lease))
            self._returning.add(task)
            task.add_done_callback(self._returned)

        context.stack.callback(give_back)

    def _returned(self, task: "asyncio.Task[None]") -> None:
        self._returning.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("a quota was not given back, and ends by itself: %r", task.exception())
