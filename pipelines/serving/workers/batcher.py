"""Dynamic batching: waiting items share one model pass, up to a cost budget, as soon as the model is free.

No timer delays a single request, and no exception stops the loop: the cost of an item is known when it is submitted,
and a pass that fails is repeated item by item, so that one bad item fails alone.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Waiting(Generic[ItemT, ResultT]):
    item: ItemT
    cost: int
    result: "asyncio.Future[ResultT]"


class Batcher(Generic[ItemT, ResultT]):
    """Runs a function on batches in its own thread, so that the event loop stays free.

    Args:
        run: Function from items to one result each, in order. An exception reaches the callers of the items that
            cause it.
        max_cost: Largest total cost of a pass; an item that costs more runs alone.
        observe: Callback with the items of each pass.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        max_cost: int,
        observe: Callable[[Sequence[ItemT]], None] = lambda items: None,
    ) -> None:
        self._run, self._max_cost, self._observe = run, max_cost, observe
        self._waiting: deque[_Waiting[ItemT, ResultT]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Number of items that wait for a pass."""
        return len(self._waiting)

    async def submit(self, item: ItemT, cost: int) -> ResultT:
        """Wait for the item's result. An item whose caller is cancelled joins no later pass."""
        waiting = _Waiting(item, cost, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._serve())
        try:
            return await waiting.result
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):  # already in a pass
                self._waiting.remove(waiting)
            raise

    async def _serve(self) -> None:
        while batch := self._next_batch():
            try:
                results = await self._in_thread(batch)
            except Exception as error:
                if len(batch) == 1:
                    _fail(batch[0], error)
                    continue
                logger.exception("a pass of %d items failed; trying them one by one", len(batch))
                for waiting in batch:
                    await self._alone(waiting)
                continue
            for waiting, result in zip(batch, results, strict=True):
                _finish(waiting, result)

    async def _alone(self, waiting: _Waiting[ItemT, ResultT]) -> None:
        if waiting.result.done():
            return
        try:
            [result] = await self._in_thread([waiting])
        except Exception as error:
            _fail(waiting, error)
        else:
            _finish(waiting, result)

    async def _in_thread(self, batch: Sequence[_Waiting[ItemT, ResultT]]) -> Sequence[ResultT]:
        items = [waiting.item for waiting in batch]
        with contextlib.suppress(Exception):  # metrics must not fail a pass
            self._observe(items)

        def work() -> Sequence[ResultT]:
            results = self._run(items)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
            return results

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _next_batch(self) -> list[_Waiting[ItemT, ResultT]]:
        batch: list[_Waiting[ItemT, ResultT]] = []
        cost = 0
        while self._waiting and (not batch or cost + self._waiting[0].cost <= self._max_cost):
            waiting = self._waiting.popleft()
            if not waiting.result.done():
                batch.append(waiting)
                cost += waiting.cost
        return batch


def _finish(waiting: _Waiting[ItemT, ResultT], result: ResultT) -> None:
    if not waiting.result.done():
        waiting.result.set_result(result)


def _fail(waiting: _Waiting[ItemT, ResultT], error: Exception) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)
