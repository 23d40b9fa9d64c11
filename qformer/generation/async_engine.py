"""An engine in a thread of its own, for callers on an event loop.

engine = AsyncEngine(Engine(language, kv_tokens=16384, max_requests=32))
async with contextlib.aclosing(engine.generate(request)) as deltas:
async for delta in deltas:
...
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractContextManager

from qformer.generation.engine import Engine, Outcome
from qformer.generation.requests.request import Delta, EngineRequest, GenerationFailedError, QueueFullError
from qformer.generation.statistics import EngineStats

logger = logging.getLogger(__name__)


class EngineClosedError(RuntimeError):
    """The engine was closed or its thread failed; the request is not finished."""


class _Caller:
    """The waiting caller of one request."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.number: int | None = None
        """The engine's number of the request, once the thread has added it."""
        self.is_cancelled = False
        # Used by the thread only.
        self._delayed: Delta | None = None
        self._next_s = 0.0

    def due(self, outcome: Outcome, min_interval_s: float) -> list[Outcome]:
        """What to deliver now: a delta joined with delayed ones, or nothing within `min_interval_s` after the last."""
        delayed, self._delayed = self._delayed, None
        if isinstance(outcome, Exception):
            return [outcome] if delayed is None else [delayed, outcome]
        delta, now_s = outcome if delayed is None else delayed.followed_by(outcome), time.monotonic()
        if delta.finish_reason is None and now_s < self._next_s:
            self._delayed = delta
            return []
        self._next_s = now_s + min_interval_s
        return [delta]


class AsyncEngine:
    """Runs an engine in a thread and delivers its outcomes to any number of event loops.

    Args:
        engine: Engine that only this thread uses from now on.
        min_interval_s: Minimum time between two deltas of a request, except the last; deltas in between are joined.
            Delivering a delta may cost more than generating it.
        step_lock: Lock held during every step, such as a `FairLock`; None: no lock.
    """

    def __init__(
        self, engine: Engine, min_interval_s: float = 0.0, step_lock: AbstractContextManager[None] | None = None
    ) -> None:
        self.engine = engine
        """The engine, for reading; its `check` may be called from any thread."""
        self._min_interval_s, self._step_lock = min_interval_s, step_lock or contextlib.nullcontext()
        self._wake = threading.Condition()
        # Passed from the loops to the thread, under the condition's lock.
        self._arrived: list[_Caller] = []
        self._cancelled: list[_Caller] = []
        self._waiting: set[_Caller] = set()
        """All callers that wait for outcomes."""
        self._is_closed = False
        # Used by the thread only.
        self._callers: dict[int, _Caller] = {}
        self._thread = threading.Thread(target=self._run, name="generation-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it accepts requests; once False, it stays False."""
        return self._thread.is_alive()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Yield a request's deltas; the last one has a finish reason. Closing the iterator cancels the request.

        Raises:
            RequestError: If it cannot be run.
            QueueFullError: If too many requests wait.
            GenerationFailedError: If the model failed on it.
            EngineClosedError: If the engine is closed before the end.
        """
        caller = _Caller(request)
        with self._wake:
            if self._is_closed:
                raise EngineClosedError("the engine is closed")
            if len(self._arrived) >= self.engine.max_queue:
                raise QueueFullError(f"{len(self._arrived)} requests have just arrived; try again later")
            self._arrived.append(caller)
            self._waiting.add(caller)
            self._wake.notify()
        is_done = False
        try:
            while not is_done:
                outcome = await caller.outcomes.get()
                if isinstance(outcome, Exception):
                    is_done = True
                    raise outcome
                is_done = outcome.finish_reason is not None
                yield outcome
        finally:
            with self._wake:
                self._waiting.discard(caller)
                if not is_done:
                    caller.is_cancelled = True
                    self._cancelled.append(caller)
                    self._wake.notify()

    def stats(self) -> EngineStats:
        """Statistics of the engine."""
        return self.engine.stats()

    def close(self) -> None:
        """End the thread; unfinished requests fail with `EngineClosedError`."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._round():
                pass
        except Exception as error:
            # The state of the engine is unknown, but callers must not wait for ever.
            logger.exception("the engine ends; a new one is needed")
            reason = f"the engine has ended: {error}"
        with self._wake:
            self._is_closed = True
            waiting = [*self._waiting]
        _deliver((caller, EngineClosedError(reason)) for caller in waiting)

    def _round(self) -> bool:
        """Do the pending work, or wait for some; False: the engine is closed."""
        with self._wake:
            while not (self._is_closed or self._arrived or self._cancelled or self.engine.is_busy):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
            if self._is_closed:
                return False
        self._cancel(cancelled)
        _deliver([*self._admit(arrived), *self._step()])
        return True

    def _cancel(self, cancelled: Iterable[_Caller]) -> None:
        for caller in cancelled:
            if caller.number is not None and self._callers.pop(caller.number, None) is not None:
                self.engine.cancel(caller.number)

    def _admit(self, arrived: Iterable[_Caller]) -> list[tuple[_Caller, Outcome]]:
        outcomes: list[tuple[_Caller, Outcome]] = []
        for caller in arrived:
            if caller.is_cancelled:
                continue
            try:
                caller.number = self.engine.add(caller.request)
                self._callers[caller.number] = caller
            except Exception as error:
                outcomes.append((caller, error))
        return outcomes

    def _step(self) -> list[tuple[_Caller, Outcome]]:
        try:
            with self._step_lock:
                step_outcomes = self.engine.step()
        except Exception as error:
            # The engine handles the errors it expects. After any other, the next request must find it working.
            logger.exception("a step failed; all running requests fail")
            failure = GenerationFailedError(f"the engine failed: {error}")
            step_outcomes = [(number, failure) for number in self.engine.drop_all()]
        outcomes: list[tuple[_Caller, Outcome]] = []
        for number, outcome in step_outcomes:
            if (caller := self._callers.get(number)) is not None:
                outcomes += [(caller, due) for due in caller.due(outcome, self._min_interval_s)]
                if isinstance(outcome, Exception) or outcome.finish_reason is not None:
                    del self._callers[number]
        return outcomes


def _deliver(outcomes: Iterable[tuple[_Caller, Outcome]]) -> None:
    """Put outcomes into their callers' queues, waking every event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Caller, Outcome]]] = defaultdict(list)
    for caller, outcome in outcomes:
        by_loop[caller.loop].append((caller, outcome))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, pairs)
        except RuntimeError:  # the loop is closed, so nobody waits
            logger.info("%d requests' event loop is closed", len(pairs))


def _put(outcomes: list[tuple[_Caller, Outcome]]) -> None:
    for caller, outcome in outcomes:
        caller.outcomes.put_nowait(outcome)
