"""The engine's benchmark at a tiny size: it measures both ways, and notices other tokens."""

import pytest
import torch

from jobs.bench import engine as bench
from jobs.bench.engine import EngineCase, measure

TINY = EngineCase(
    hidden_size=16, num_layers=1, num_heads=2, vocab_size=50, concurrency=(1, 3), requests_per_slot=1, rounds=1
)


def test_both_ways_are_measured():
    result = measure(TINY)
    assert set(result.ratios) == {"speedup 1", "first token 1", "speedup 3", "first token 3"}
    assert set(result.rates) == {f"{name} {n} tokens/s" for name in ("engine", "transformers") for n in (1, 3)}
    for name in ("engine", "transformers"):
        assert result.seconds[f"{name} 3 first token"] < result.seconds[f"{name} 3 at a time"]


def test_the_first_token_of_one_request_comes_long_before_its_last():
    language, requests = bench.build_language(TINY), bench.make_requests(TINY, 20)
    longest = max(requests, key=lambda request: request.settings.max_new_tokens)
    for way in (bench._engine(language, [longest], 1), bench._static(language, [longest], 1)):
        way()  # the first one also builds what torch builds once
        timing = way()
        assert timing.first_token_s < timing.total_s / 2


def test_other_tokens_are_noticed(monkeypatch):
    real = bench._generate
    monkeypatch.setattr(bench, "_generate", lambda *args: (real(*args) + 1) % 50)
    with pytest.raises(ValueError, match="the engine gives"):
        measure(TINY)


def test_the_same_requests_every_time():
    first, again = bench.make_requests(TINY, 3), bench.make_requests(TINY, 3)
    assert [r.settings for r in first] == [r.settings for r in again]
    assert all(torch.equal(a.inputs_SL, b.inputs_SL) for a, b in zip(first, again, strict=True))
