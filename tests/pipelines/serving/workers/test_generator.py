"""A replica of the generator in this process, over a tiny language model."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.serving.contract.errors import Refusal
from pipelines.serving.contract.wire import AnswerSettings, Prompt
from pipelines.serving.workers.generator import LONG_PROMPT, GeneratorWorker
from tests.qformer.test_language import tiny_language


class Source:
    """In place of where a language model comes from."""

    def load(self, device):
        return tiny_language("llama")


@pytest.fixture
def worker():
    worker = GeneratorWorker(Source(), kv_tokens=256, max_sequences=4, max_prompt_tokens=64, use_gpu=False)
    yield worker
    worker._engine.close()


def prompt(*segments, max_new_tokens=8):
    return Prompt(segments=segments, settings=AnswerSettings(max_new_tokens=max_new_tokens))


def test_a_replica_whose_engine_has_ended_says_so_and_is_replaced(worker, monkeypatch):
    def broken(*_):
        raise MemoryError("boom")

    worker.check_health()
    for name in ("step", "drop_all"):
        monkeypatch.setattr(worker._engine.engine, name, broken)
    for _ in range(2):  # the one that meets it, and one after
        answer = asyncio.run(worker.answer(prompt("red")))
        assert isinstance(answer, Refusal) and (answer.status, answer.code) == (503, "unavailable")
    worker._engine._thread.join(5)
    with pytest.raises(RuntimeError, match="has ended"):
        worker.check_health()


@pytest.mark.parametrize(("num_rows", "param"), [(60, "max_tokens"), (80, "messages")])
def test_what_is_too_long_is_said_in_the_clients_words(worker, num_rows, param):
    rows = np.zeros((num_rows, 32), dtype=np.float32)
    refusal = asyncio.run(worker.answer(prompt(rows, "red", max_new_tokens=20)))
    assert (refusal.status, refusal.code, refusal.param) == (400, "context_length_exceeded", param)
    # The leading token, and the word.
    assert f"takes {num_rows + 2} tokens" in refusal.message and "max_tokens=20; 64 is the most" in refusal.message
    assert not any(word in refusal.message for word in ("kv_tokens", "max_new_tokens", "rows"))


def test_texts_may_have_as_many_tokens_as_the_limit_says_and_not_one_more(worker):
    worker._max_prompt_tokens = 8  # the leading token, and seven words
    rows = np.zeros((4, 32), dtype=np.float32)
    fits = asyncio.run(worker.answer(prompt("red " * 3, rows, "red " * 4, max_new_tokens=1)))
    assert (fits.prompt_tokens, fits.completion_tokens) == (12, 1)
    refusal = asyncio.run(worker.answer(prompt("red " * 4, rows, "red " * 4, max_new_tokens=1)))
    assert (refusal.code, refusal.param) == ("context_length_exceeded", "messages")
    assert "9 text tokens exceed the limit of 8" in refusal.message


@pytest.mark.parametrize(("text", "is_aside"), [("red", False), ("red " * LONG_PROMPT, True)])
def test_only_long_prompts_are_read_beside_the_event_loop(worker, monkeypatch, text, is_aside):
    threads = []

    def read(*_):
        threads.append(threading.current_thread())
        return Refusal(400, "read", "that is enough")

    monkeypatch.setattr(worker, "_request", read)
    asyncio.run(worker.answer(prompt(text)))
    assert [thread is not threading.current_thread() for thread in threads] == [is_aside]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_features_are_the_servers_fault(worker, value):
    rows = np.full((4, 32), value, dtype=np.float32)
    refusal = asyncio.run(worker.answer(prompt(rows, "red")))
    assert (refusal.status, refusal.code) == (500, "internal")


def test_text_that_no_token_stands_for_is_refused(worker):
    worker._language = tiny_language("gpt2")
    worker._language.tokenizer.backend_tokenizer.post_processor = None  # no leading token
    refusal = asyncio.run(worker.answer(prompt("")))
    assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_request", "messages")


def test_the_figures_of_a_replica_at_rest_are_0(worker, monkeypatch):
    monkeypatch.setattr("pipelines.serving.workers.generator.STATS_EVERY_S", 0.01)
    monkeypatch.setattr("qformer.generation.statistics._RECENT_S", 0.2)
    told = {}
    for name in worker._gauges:
        worker._gauges[name] = SimpleNamespace(set=lambda value, name=name: told.setdefault(name, []).append(value))

    async def run():
        await worker.answer(prompt("red", max_new_tokens=50))
        await asyncio.wait_for(worker._reporting, 10)

    asyncio.run(run())
    assert max(told["mean_batch_size"]) > 0 and max(told["tokens_per_s"]) > 0
    assert told["mean_batch_size"][-1] == told["tokens_per_s"][-1] == told["running"][-1] == 0
