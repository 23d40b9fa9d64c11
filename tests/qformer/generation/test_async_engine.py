"""The engine in its thread: deltas on event loops, cancelled requests, failures and the end."""

import asyncio
import contextlib
import functools
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qformer.generation.async_engine import AsyncEngine, EngineClosedError
from qformer.generation.engine import Engine
from qformer.generation.requests.request import Delta, GenerationFailedError, QueueFullError, RequestSettings
from tests.qformer.generation.engine_requests import make_requests, reference_answers
from tests.qformer.test_language import tiny_language


@pytest.fixture(scope="module")
def language():
    language = tiny_language("llama")
    language.model.generation_config.eos_token_id = None
    return language


@pytest.fixture
def engine(language):
    engine = AsyncEngine(Engine(language, kv_tokens=512, max_requests=4, max_queue=8))
    yield engine
    engine.close()


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


def test_many_callers_get_their_own_deltas(language, engine):
    async def main():
        return await asyncio.gather(*(collect(engine, request) for request in make_requests(language)))

    for deltas, expected in zip(asyncio.run(main()), reference_answers(language), strict=True):
        assert "".join(delta.text for delta in deltas) == expected
        assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
        assert sum(len(delta.token_ids) for delta in deltas) == deltas[-1].usage.completion_tokens
    assert asyncio.run(main())  # another event loop


def test_text_streams_while_others_run(language, engine):
    async def main():
        first = make_requests(language, (30,) * 5)[0]
        deltas = engine.generate(first)
        begun = await anext(deltas)
        short = await collect(engine, replace(first, settings=RequestSettings(max_new_tokens=2)))
        assert engine.stats().running == 1 and short[-1].finish_reason is not None
        return [begun, *[delta async for delta in deltas]]

    assert asyncio.run(main())[-1].finish_reason is not None


def test_text_may_come_in_larger_parts(language, monkeypatch):
    """Not more often than told, nothing lost, and the end at once."""
    request, now = make_requests(language, (30,) * 5)[0], itertools.count()
    # A clock that only the hand-overs move, one second for each token.
    monkeypatch.setattr("qformer.generation.async_engine.time", SimpleNamespace(monotonic=lambda: next(now)))

    def run(gap_s):
        engine = AsyncEngine(Engine(language, kv_tokens=512, max_requests=4), gap_s)
        deltas = asyncio.run(collect(engine, request))
        engine.close()
        return deltas

    each, rare = run(0.0), run(7.0)
    parts = [each[:1], *(each[start : start + 7] for start in range(1, len(each), 7))]
    assert len(parts) > 4 and rare == [functools.reduce(Delta.followed_by, part) for part in parts]
    assert rare[-1].finish_reason == "length" and sum(len(delta.token_ids) for delta in rare) == 30
    assert "".join(delta.text for delta in rare) == "".join(delta.text for delta in each)


def test_a_gone_caller_frees_its_slot(language, engine):
    async def main():
        request = make_requests(language, (50,) * 5)[0]
        async with contextlib.aclosing(engine.generate(request)) as deltas:
            await anext(deltas)
        task = asyncio.create_task(collect(engine, request))
        await asyncio.sleep(0)  # queued, perhaps running
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        deadline = time.monotonic() + 5
        while (engine.stats().running or engine.stats().queued) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        return engine.stats()

    stats = asyncio.run(main())
    assert (stats.running, stats.queued, stats.finished_total) == (0, 0, 0)


def test_errors_reach_their_caller_alone(language, engine, monkeypatch):
    async def main():
        good, other = make_requests(language)[:2]
        wrong = replace(good, inputs_SL=torch.full_like(good.inputs_SL, torch.nan))
        return await asyncio.gather(*(collect(engine, r) for r in (good, wrong, other)), return_exceptions=True)

    first, refused, second = asyncio.run(main())
    assert isinstance(refused, GenerationFailedError) and first[-1].finish_reason and second[-1].finish_reason

    def broken():
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "step", broken)
        failed = asyncio.run(main())
        assert all(isinstance(outcome, GenerationFailedError) for outcome in failed)
    assert asyncio.run(main())[0][-1].finish_reason  # it goes on


@pytest.mark.parametrize("broken", ["cancel", "drop_all", "admit"])
def test_what_ends_the_thread_leaves_nobody_waiting(language, engine, monkeypatch, broken):
    def boom(*_):
        raise MemoryError("boom")

    async def main():
        request = make_requests(language, (50,) * 5)[0]
        others = [asyncio.create_task(collect(engine, request)) for _ in range(6)]  # four run, two wait
        async with contextlib.aclosing(engine.generate(request)) as deltas:
            first = asyncio.create_task(anext(deltas))
            await asyncio.sleep(0.02)
            match broken:
                case "cancel":
                    monkeypatch.setattr(engine.engine, "cancel", boom)
                    others.pop(0).cancel()
                case "drop_all":
                    monkeypatch.setattr(engine.engine, "drop_all", boom)
                    monkeypatch.setattr(engine.engine, "step", boom)
                case "admit":
                    monkeypatch.setattr(engine, "_admit", boom)
                    others.append(asyncio.create_task(collect(engine, request)))
            outcomes = await asyncio.gather(*others, first, return_exceptions=True)
            with pytest.raises(EngineClosedError):
                await collect(engine, request)
        return outcomes

    outcomes = asyncio.run(asyncio.wait_for(main(), 20))
    assert sum(isinstance(outcome, EngineClosedError) for outcome in outcomes) >= 2
    engine._thread.join(5)
    assert not engine.is_alive


def test_a_full_queue_refuses(language):
    engine = AsyncEngine(Engine(language, kv_tokens=64, max_requests=1, max_queue=2))

    async def main():
        requests = make_requests(language, (30,) * 5) * 4
        return await asyncio.gather(*(collect(engine, r) for r in requests), return_exceptions=True)

    outcomes = asyncio.run(main())
    engine.close()
    assert any(isinstance(outcome, QueueFullError) for outcome in outcomes)
    assert any(isinstance(outcome, list) for outcome in outcomes)
    assert all(isinstance(outcome, QueueFullError | list) for outcome in outcomes)


def test_closing_fails_what_is_in_work(language):
    engine = AsyncEngine(Engine(language, kv_tokens=512, max_requests=4))

    async def main():
        deltas = engine.generate(make_requests(language, (50,) * 5)[0])
        await anext(deltas)
        engine.close()
        with pytest.raises(EngineClosedError):
            [delta async for delta in deltas]
        with pytest.raises(EngineClosedError):
            await collect(engine, make_requests(language)[0])

    asyncio.run(main())
