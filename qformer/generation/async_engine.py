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
    """The engine was closed, or its thread has ended by itself; the request was not finished."""


class _Caller:
    """Who waits for one request's news."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[Outcome] = asyncio.Queue()
        self.number: int | None = None
        """The engine's name for the request, once the thread has taken it."""
        self.is_gone = False
        # The thread's own.
        self._held: Delta | None = None
        self._next_s = 0.0

    def due(self, news: Outcome, gap_s: float) -> list[Outcome]:
        """What to hand out now: a delta, joined to those held back, unless the last one went less than `gap_s` ago."""
        held, self._held = self._held, None
        if isinstance(news, Exception):
            return [news] if held is None else [held, news]
        delta, now_s = news if held is None else held.followed_by(news), time.monotonic()
        if delta.finish_reason is None and now_s < self._next_s:
            self._held = delta
            return []
        self._next_s = now_s + gap_s
        return [delta]


class AsyncEngine:
    """Runs an engine in a thread and hands its news to event loops; any number of loops may use it.

    Args:
        engine: Belongs to the thread from now on.
        gap_s: Least time between two deltas of a request but the last; what it generates meanwhile comes together.
            Handing out a delta may cost more than generating it.
        turn: Held for every step; see `FairLock`.
    """

    def __init__(self, engine: Engine, gap_s: float = 0.0, turn: AbstractContextManager[None] | None = None) -> None:
        self.engine = engine
        """To look at; its `check` may be called from anywhere."""
        self._gap_s, self._turn = gap_s, turn or contextlib.nullcontext()
        self._wake = threading.Condition()
        # Handed from loops to the thread, under the condition's lock.
        self._arrived: list[_Caller] = []
        self._gone: list[_Caller] = []
        self._waiting: set[_Caller] = set()
        """All who wait for news, whatever has become of their requests."""
        self._is_closed = False
        # The thread's own.
        self._callers: dict[int, _Caller] = {}
        self._thread = threading.Thread(target=self._run, name="generation-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests; once False it stays so."""
        return self._thread.is_alive()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Yield a request's deltas; the last one has a finish reason. Closing the iterator cancels the request.

        Raises:
            RequestError: If it cannot be run.
            QueueFullError: If too many requests wait.
            GenerationFailedError: If the model failed on it.
            EngineClosedError: If the engine is closed, or is so before the end.
        """
        caller = _Caller(request)
        with self._wake:
            if self._is_closed:
                raise EngineClosedError("the engine is closed")
            if len(self._arrived) >= self.engine.max_queue:
                raise QueueFullError(f"{len(self._arrived)} requests have just come; try again later")
            self._arrived.append(caller)
            self._waiting.add(caller)
            self._wake.notify()
        is_done = False
        try:
            while not is_done:
                outcome = await caller.news.get()
                if isinstance(outcome, Exception):
                    is_done = True
                    raise outcome
                is_done = outcome.finish_reason is not None
                yield outcome
        finally:
            with self._wake:
                self._waiting.discard(caller)
                if not is_done:
                    caller.is_gone = True
                    self._gone.append(caller)
                    self._wake.notify()

    def stats(self) -> EngineStats:
        """What the engine does and did."""
        return self.engine.stats()

    def close(self) -> None:
        """End the thread; requests in work fail with `EngineClosedError`."""
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
            # Nothing is known of the engine's state any more; but who waits must not wait for ever.
            logger.exception("the engine ends; a new one is needed")
            reason = f"the engine has ended: {error}"
        with self._wake:
            self._is_closed = True
            waiting = [*self._waiting]
        _deliver((caller, EngineClosedError(reason)) for caller in waiting)

    def _round(self) -> bool:
        """Do what there is to do, or wait for something; False: the engine is closed."""
        with self._wake:
            while not (self._is_closed or self._arrived or self._gone or self.engine.is_busy):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            gone, self._gone = self._gone, []
            if self._is_closed:
                return False
        self._leave(gone)
        _deliver([*self._admit(arrived), *self._step()])
        return True

    def _leave(self, gone: Iterable[_Caller]) -> None:
        for caller in gone:
            if caller.number is not None and self._callers.pop(caller.number, None) is not None:
                self.engine.cancel(caller.number)

    def _admit(self, arrived: Iterable[_Caller]) -> list[tuple[_Caller, Outcome]]:
        news: list[tuple[_Caller, Outcome]] = []
        for caller in arrived:
            if caller.is_gone:
                continue
            try:
                caller.number = self.engine.add(caller.request)
                self._callers[caller.number] = caller
            except Exception as error:
                news.append((caller, error))
        return news

    def _step(self) -> list[tuple[_Caller, Outcome]]:
        try:
            with self._turn:
                outcomes = self.engine.step()
        except Exception as error:
            # The engine lets none out that it foresees; whatever this is, the next request shall find it working.
            logger.exception("a step failed; all requests in work fail")
            failure = GenerationFailedError(f"the engine failed: {error}")
            outcomes = [(number, failure) for number in self.engine.drop_all()]
        news: list[tuple[_Caller, Outcome]] = []
        for number, outcome in outcomes:
            if (caller := self._callers.get(number)) is not None:
                news += [(caller, due) for due in caller.due(outcome, self._gap_s)]
                if isinstance(outcome, Exception) or outcome.finish_reason is not None:
                    del self._callers[number]
        return news


def _deliver(news: Iterable[tuple[_Caller, Outcome]]) -> None:
    """Put news into their callers' queues, waking every event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Caller, Outcome]]] = defaultdict(list)
    for caller, outcome in news:
        by_loop[caller.loop].append((caller, outcome))
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, some)
        except RuntimeError:  # the loop is closed, and its callers are gone
            logger.info("%d requests' event loop is closed", len(some))


def _put(news: list[tuple[_Caller, Outcome]]) -> None:
    for caller, outcome in news:
        caller.news.put_nowait(outcome)
