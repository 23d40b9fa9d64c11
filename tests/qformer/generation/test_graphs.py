"""Recorded decode passes: the answers of unrecorded ones. Without a GPU a replay calls the pass again."""

import logging

import pytest
import torch

from qformer.generation.completion import complete
from qformer.generation.engine import Engine
from qformer.generation.graphs import DecodeGraphs, gpu_recorder
from qformer.generation.request import EngineRequest, RequestSettings
from tests.qformer.generation.requests import make_requests, reference_answers
from tests.qformer.generation.test_engine import SHAPES, texts
from tests.qformer.test_language import FAMILIES, tiny_language

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


class Recorder:
    """Records by keeping the call, or as a GPU does."""

    def __init__(self, device):
        self.num_recorded = self.num_replayed = 0
        self._device = device

    def __call__(self):
        on_gpu = gpu_recorder() if self._device == "cuda" else None
        return lambda call: self._record(call, on_gpu)

    def _record(self, call, on_gpu):
        self.num_recorded += 1
        output, replay = (call().clone(), lambda: output.copy_(call())) if on_gpu is None else on_gpu(call)

        def counted():
            self.num_replayed += 1
            replay()

        return output, counted


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "t5"])
def language(request):
    return tiny_language(request.param)


def recording_engine(language, recorder, **sizes):
    engine = Engine(language, **sizes)
    passes = engine._passes
    device = passes._weight.device
    passes._graphs = DecodeGraphs(passes._read, passes.slots, device, recorder=recorder)
    return engine


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batches_answer_what_the_offline_path_does(language, shape, device):
    """One by one, in chunks, with moving slots: replays have rows to fill up, beside prompts that are read in part."""
    kv_tokens, max_requests, prefill_tokens = shape
    expected, made, recorder = reference_answers(language), make_requests(language), Recorder(device)
    requests = [EngineRequest(inputs_SL=one.inputs_SL.to(device), settings=one.settings) for one in made * 2]
    language.model.to(device)
    try:
        sizes = {"kv_tokens": kv_tokens, "max_requests": max_requests, "prefill_tokens": prefill_tokens}
        engine = recording_engine(language, recorder, **sizes)
        assert texts(complete(engine, requests)) == expected * 2
    finally:
        language.model.to("cpu")
    assert recorder.num_replayed >= recorder.num_recorded > 0


def test_a_prompt_that_fills_its_slot_is_not_overwritten(language):
    """What fills a pass up is written to the last column, which here is a prompt's own."""
    inputs_SL = torch.randn(64, language.width, generator=torch.Generator().manual_seed(1)) * 0.5
    long = EngineRequest(inputs_SL=inputs_SL, settings=RequestSettings(max_new_tokens=1))
    others = [
        EngineRequest(inputs_SL=inputs_SL[start : start + 3], settings=RequestSettings(max_new_tokens=40))
        for start in (0, 7, 20)
    ]
    sizes = {"kv_tokens": 1024, "max_requests": 8, "prefill_tokens": 9}
    plain = texts(complete(Engine(language, **sizes), [*others, long]))
    recorder = Recorder("cpu")
    assert texts(complete(recording_engine(language, recorder, **sizes), [*others, long])) == plain
    assert recorder.num_replayed


def test_moved_memory_is_recorded_anew(language):
    recorder = Recorder("cpu")
    engine = recording_engine(language, recorder, kv_tokens=4096, max_requests=4)
    first = make_requests(language)[4:]
    expected = texts(complete(engine, first))
    before = recorder.num_recorded
    assert texts(complete(engine, first)) == expected
    assert recorder.num_recorded == before  # another run of the same sizes
    complete(engine, make_requests(language))  # which takes more slots
    assert texts(complete(engine, first)) == expected
    assert recorder.num_recorded > before


def test_a_pass_that_cannot_be_recorded_runs_as_it_is(language, caplog):
    tries = []

    def refuse(call):
        tries.append(call)
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = recording_engine(language, lambda: refuse, kv_tokens=1024, max_requests=8)
    with caplog.at_level(logging.WARNING):
        assert texts(complete(engine, make_requests(language))) == reference_answers(language)
    assert len(tries) == 1 and "decoding runs unrecorded" in caplog.text
