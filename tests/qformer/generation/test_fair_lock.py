"""Turns: one at a time, in the order of asking, and taken by every step of an engine."""

import asyncio
import threading
import time

import pytest

from qformer.generation.async_engine import AsyncEngine
from qformer.generation.engine import Engine
from qformer.generation.fair_lock import FairLock
from tests.qformer.generation.engine_requests import make_requests
from tests.qformer.test_language import tiny_language


def test_who_asks_first_is_next_also_before_the_holder_again():
    turns, order = FairLock(), []

    def work(name):
        with turns:
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            while turns._next_ticket < number + 2:  # it has asked
                time.sleep(0.001)
        order.append("holder")
    work("holder again")
    for thread in threads:
        thread.join()
    assert order == ["holder", "a", "b", "holder again"]


def test_an_exception_hands_the_turn_on():
    turns = FairLock()
    with pytest.raises(ValueError, match="a pass failed"), turns:
        raise ValueError("a pass failed")
    assert turns._current == turns._next_ticket == 1


def test_an_engine_waits_for_its_turn():
    language, turns = tiny_language("llama"), FairLock()
    engine = AsyncEngine(Engine(language, kv_tokens=512, max_requests=4), step_lock=turns)
    request = make_requests(language)[0]

    async def answer():
        return [delta async for delta in engine.generate(request)]

    async def main():
        with turns:
            asking = asyncio.create_task(answer())
            while turns._next_ticket < 2:  # the engine asks for a turn
                await asyncio.sleep(0.001)
            assert engine.stats().queued == 1 and not asking.done()
        return await asking

    assert asyncio.run(main())[-1].finish_reason is not None
    engine.close()
