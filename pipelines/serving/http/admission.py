"""Handling common to all requests: API key, concurrency limit, quota, deadline and log record."""

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
from pipelines.serving.http.keys import KeyTable
from pipelines.serving.http.records import RequestRecord, RequestReporter
from pipelines.serving.workers.graph import Models

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SLOT_GRACE_S = 30.0
"""Time after a request's deadline at which its slot is free again, even if it was never released."""


class RequestContext:
    """State of one request.

    Args:
        record: Fields of the log line.
        deadline_s: Deadline on the event loop's clock.
    """

    def __init__(self, record: RequestRecord, deadline_s: float) -> None:
        self.record, self.deadline_s = record, deadline_s
        self.stack = contextlib.AsyncExitStack()
        """Callbacks for the end of the request; a streamed answer takes them over (`detach_stack`)."""

    def detach_stack(self) -> contextlib.AsyncExitStack:
        """Move the callbacks to a streamed answer, which outlives the handler."""
        return self.stack.pop_all()


class StreamedAnswer(StreamingResponse):
    """Server-sent events. Closes `stack` however the answer ends, even if it never begins.

    Args:
        events: Text of the events.
        stack: Callbacks for the end of the request.
    """

    def __init__(self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


Handler = Callable[[Request, RequestContext], Awaitable[Any]]


class Admission:
    """Runs handlers within the limits of the service.

    Args:
        limits: Limits of one request and of concurrent requests.
        models: Models, of which this class calls the quotas.
        reporter: Log and metrics of requests.
    """

    def __init__(self, limits: RequestLimits, models: Models, reporter: RequestReporter) -> None:
        self.limits, self._models, self._reporter = limits, models, reporter
        self.keys = KeyTable()
        self._slots: dict[int, float] = {}
        self._numbers = itertools.count()
        self._releases: set[asyncio.Task[None]] = set()

    async def run(self, request: Request, route: str, handler: Handler) -> Response:
        """Answer a request with the handler's JSON or response, or with its error."""
        context = self._context(request, route)
        record = context.record
        async with context.stack:
            context.stack.callback(self._reporter.end, record)
            response = await self._answer(request, context, handler)
            if not isinstance(response, StreamedAnswer):  # which sets its status at its end
                record.status = response.status_code
        response.headers[REQUEST_ID_HEADER] = record.id
        return response

    async def _answer(self, request: Request, context: RequestContext, handler: Handler) -> Response:
        record = context.record
        try:
            async with asyncio.timeout_at(context.deadline_s):
                key = self.keys.identify(request.headers.get("authorization"))
                record.key = None if key is None else key.name
                self._take_slot(context)
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
            refused = ApiError(499, "client_closed", "the client disconnected before it had sent the whole request")
        except Exception:
            logger.exception("request %s failed", record.id)
            refused = internal_error()
        record.error = refused.code
        return error_response(refused.refusal)

    def _context(self, request: Request, route: str) -> RequestContext:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        name = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        deadline_s = asyncio.get_running_loop().time() + self.limits.timeout_s
        return RequestContext(RequestRecord(name, route), deadline_s)

    def _take_slot(self, context: RequestContext) -> None:
        """Take one of the concurrency slots. No lock is needed, as all requests share one event loop."""
        now_s = time.monotonic()
        if len(self._slots) >= self.limits.max_concurrent:
            self._slots = {slot: end_s for slot, end_s in self._slots.items() if end_s > now_s}
        if len(self._slots) >= self.limits.max_concurrent:
            message = "too many requests in work; try again"
            raise ApiError(503, "overloaded", message, retry_after_s=RETRY_AFTER_S)
        slot = next(self._numbers)
        self._slots[slot] = now_s + self.limits.timeout_s + _SLOT_GRACE_S
        self._reporter.count(len(self._slots))
        context.stack.callback(self._release_slot, slot)

    def _release_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._reporter.count(len(self._slots))

    async def _take_quota(self, key: ApiKey, context: RequestContext) -> None:
        lease = await self._models.take_quota(key)

        def give_back() -> None:
            # A separate task, because this one may be cancelled with its client.
            task = asyncio.create_task(self._models.give_quota(key, lease))
            self._releases.add(task)
            task.add_done_callback(self._release_done)

        context.stack.callback(give_back)

    def _release_done(self, task: "asyncio.Task[None]") -> None:
        self._releases.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("a quota lease was not released and will expire: %r", task.exception())
