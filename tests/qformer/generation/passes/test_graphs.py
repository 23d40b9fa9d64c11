"""Recorded decode passes: the answers of unrecorded ones. Without a GPU a replay calls the pass again."""

import logging

import pytest
import torch

from qformer.generation.completion import complete
from qformer.generation.engine import Engine
from qformer.generation.passes.graphs import DecodeGraphs, gpu_recorder
from qformer.generation.requests.request import EngineRequest, RequestSettings
from tests.qformer.generation.engine_requests import make_requests, reference_answers
from tests.qformer.generation.test_engine import SHAPES, texts
from tests.qformer.test_language import tiny_language

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Recorder:
    """Records by keeping the call, or as a GPU does."""

    def __init__(self):
        self.num_memories = self.num_recorded = self.num_replayed = 0

    def __call__(self, device):
        self.num_memories += 1
        on_gpu = gpu_recorder(device) if device.type == "cuda" else None
        return lambda call: self._record(call, on_gpu)

    def _record(self, call, on_gpu):
        self.num_recorded += 1
        output, replay = (call().clone(), lambda: output.copy_(call())) if on_gpu is None else on_gpu(call)

        def counted():
            self.num_replayed += 1
            replay()

        return output, counted


@pytest.fixture(scope="module", params=["opt", "llama"])
def language(request):
    return tiny_language(request.param)


def recording_engine(language, recorder, **sizes):
    engine = Engine(language, **sizes)
    passes = engine._passes
    device = passes._weight.device
    passes._graphs = DecodeGraphs(passes.slots, device, recorder=recorder)
    return engine


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batches_answer_what_the_offline_path_does(language, shape, device):
    """One by one, in chunks, with moving slots: replays have rows to fill up, beside prompts that are read in part."""
    kv_tokens, max_requests, prefill_tokens = shape
    expected, made, recorder = reference_answers(language), make_requests(language), Recorder()
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
    recorder = Recorder()
    assert texts(complete(recording_engine(language, recorder, **sizes), [*others, long])) == plain
    assert recorder.num_replayed


def test_moved_memory_is_recorded_anew(language):
    recorder = Recorder()
    engine = recording_engine(language, recorder, kv_tokens=4096, max_requests=4)
    first = make_requests(language)[4:]
    expected = texts(complete(engine, first))
    before = recorder.num_memories, recorder.num_recorded
    assert texts(complete(engine, first)) == expected
    assert (recorder.num_memories, recorder.num_recorded) == before  # another run of the same sizes
    complete(engine, make_requests(language))  # which takes more slots
    assert texts(complete(engine, first)) == expected
    assert recorder.num_memories > before[0] and recorder.num_recorded > before[1]


def test_a_pass_that_cannot_be_recorded_runs_as_it_is(language, caplog):
    tries = []

    def refuse(call):
        tries.append(call)
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = recording_engine(language, lambda device: refuse, kv_tokens=1024, max_requests=8)
    with caplog.at_level(logging.WARNING):
        assert texts(complete(engine, make_requests(language))) == reference_answers(language)
    assert len(tries) == 1 and "decoding runs unrecorded" in caplog.text


def test_a_recorded_pass_that_fails_is_tried_again_row_by_row(language):
    """As an unrecorded one: nobody else fails with it."""
    failing = []

    class Failing(Recorder):
        def _record(self, call, on_gpu):
            output, replay = super()._record(call, on_gpu)

            def sometimes():
                if len(output) > 1:
                    failing.append(len(output))
                    raise RuntimeError("no memory")
                replay()

            return output, sometimes

    engine = recording_engine(language, Failing(), kv_tokens=1024, max_requests=8)
    assert texts(complete(engine, make_requests(language))) == reference_answers(language)
    assert failing


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_the_gpu_as_it_was(caplog):
    """Reading a number back is what no recording may do."""
    language = tiny_language("opt")
    made, expected = make_requests(language), reference_answers(language)
    language.model.to("cuda")
    engine = Engine(language, kv_tokens=1024, max_requests=8)
    passes, before = engine._passes, torch.cuda.current_stream()
    real = passes._read

    def reading(packed_3B, rows, columns):
        int(packed_3B.sum())
        return real(packed_3B, rows, columns)

    passes._read = reading
    requests = [EngineRequest(inputs_SL=one.inputs_SL.to("cuda"), settings=one.settings) for one in made]
    assert texts(complete(engine, requests)) == expected
    assert "decoding runs unrecorded" in caplog.text
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
