"""Shared passes: what is taken together, what fails alone, and that nothing stops the loop."""

import asyncio
import threading

import pytest

from pipelines.serving.workers.batcher import Batcher


class Doubler:
    """Doubles numbers; notes its passes; cannot bear what it was told not to."""

    def __init__(self, *bad, gate=None):
        self.bad, self.passes, self.gate = set(bad), [], gate

    def __call__(self, items):
        self.passes.append(list(items))
        if self.gate is not None:
            self.gate.wait(5)
        if worst := self.bad & set(items):
            raise ValueError(f"cannot bear {worst}")
        return [2 * item for item in items]


async def submitted(batcher, *items, cost=1):
    return await asyncio.gather(*[batcher.submit(item, cost) for item in items], return_exceptions=True)


def test_what_waits_is_taken_together_up_to_the_budget():
    work = Doubler()
    assert asyncio.run(submitted(Batcher(work, 4), *range(10), cost=2)) == [2 * n for n in range(10)]
    assert work.passes == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_an_item_over_the_budget_goes_alone():
    async def run():
        batcher = Batcher(work, 4)
        return await asyncio.gather(*[batcher.submit(cost, cost) for cost in (1, 9, 3, 1)])

    work = Doubler()
    assert asyncio.run(run()) == [2, 18, 6, 2]
    assert work.passes == [[1], [9], [3, 1]]


def test_one_bad_item_fails_alone_and_the_next_pass_comes():
    async def run():
        batcher = Batcher(work, 8)
        return await submitted(batcher, 1, 2, 3), await submitted(batcher, 2), await submitted(batcher, 4, 5)

    work = Doubler(2)
    (one, two, three), [alone], later = asyncio.run(run())
    assert (one, three, later) == (2, 6, [8, 10])
    assert isinstance(two, ValueError) and isinstance(alone, ValueError)
    assert work.passes == [[1, 2, 3], [1], [2], [3], [2], [4, 5]]  # what fails alone is not tried twice


def test_a_wrong_number_of_results_or_a_broken_observer_stalls_nobody():
    async def run():
        lost = await submitted(Batcher(lambda items: [], 8), 1, 2)
        batcher = Batcher(Doubler(), 8, observe=lambda items: 1 / 0)
        return lost, await submitted(batcher, 1), await submitted(batcher, 2)

    lost, *rest = asyncio.run(asyncio.wait_for(run(), 10))
    assert all(isinstance(error, RuntimeError) for error in lost) and rest == [[2], [4]]


def test_an_item_whose_caller_has_gone_is_left_out():
    async def run():
        batcher = Batcher(work, 1)
        first = asyncio.create_task(batcher.submit(1, 1))
        await asyncio.sleep(0.1)  # it is in the thread
        gone, third = (asyncio.create_task(batcher.submit(n, 1)) for n in (2, 3))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.num_waiting == 1
        work.gate.set()
        return await first, await third

    work = Doubler(gate=threading.Event())
    assert asyncio.run(run()) == (2, 6) and work.passes == [[1], [3]]
