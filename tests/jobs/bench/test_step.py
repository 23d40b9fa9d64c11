"""The benchmark of whole steps at a tiny size: the trainer's own loop, with an encoder and without."""

import dataclasses
import gc
import weakref

import pytest
import torch

from jobs.bench import step as bench
from jobs.bench.step import StepCase, measure
from qformer.config import QFormerSizes

TINY = StepCase(
    vision="test_vit",
    qformer=QFormerSizes(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=16, num_queries=2),
    vocabulary=40,
    batch=4,
    warm_up=1,
    timed=2,
)


def test_every_way_is_measured(monkeypatch):
    torch._dynamo.reset()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )
    result = measure(dataclasses.replace(TINY, is_compiled=True))
    names = ["uncached", "uncached compiled", "cached", "cached compiled"]
    assert list(result.seconds) == [f"step, {name}" for name in names]
    assert result.ratios == {}  # no peak is known of a CPU
    for name in names:
        assert result.rates[f"{name} images/s"] * result.seconds[f"step, {name}"] == pytest.approx(4)
        assert f"{name} TFLOP/s" in result.rates


def test_cached_steps_run_without_the_encoder():
    run = bench._training_run(TINY)
    inputs, encoder = bench._inputs(TINY, run), weakref.ref(run.frozen["vision"])
    texts = bench._captions(TINY, [5, 7])
    bench._steps(TINY, run, inputs["uncached"], texts)
    bench._drop_encoder(run)
    gc.collect()
    assert encoder() is None
    bench._steps(TINY, run, inputs["cached"], texts)


def test_captions_are_as_long_as_real_ones():
    texts = bench._captions(TINY, [5, 7, 90])
    assert {len(text.split()) + 2 for step in texts for text in step} == {5, 7, bench.MAX_TEXT_TOKENS}
