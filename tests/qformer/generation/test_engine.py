"""Continuous batching: the answers of `LanguageModel.generate`, whatever else is in the batch, and failures alone."""

from dataclasses import replace

import pytest
import torch

from qformer.adapters.lora import Lora
from qformer.config import GenerationSettings, LoraConfig
from qformer.errors import UserError
from qformer.generation.completion import complete
from qformer.generation.engine import Engine
from qformer.generation.requests.inputs import prompt_inputs, require_shareable, segment_inputs, text_ids
from qformer.generation.requests.request import (
    EngineRequest,
    GenerationFailedError,
    QueueFullError,
    RequestError,
    RequestSettings,
    TooLongError,
)
from tests.qformer.generation.engine_requests import LENGTHS, make_requests, reference_answers
from tests.qformer.test_language import FAMILIES, PROMPTS, soft_prompts, tiny_language

# (kv_tokens, max_requests, prefill_tokens): one by one, in chunks of 3, by two, all at once, and with moving slots.
SHAPES = [(64, 1, 100), (64, 1, 3), (128, 2, 100), (1024, 8, 100), (1024, 8, 8), (192, 3, 16)]


@pytest.fixture(scope="module", params=FAMILIES)
def language(request):
    return tiny_language(request.param)


def texts(results):
    return [result if isinstance(result, Exception) else result.text for result in results]


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batches_answer_what_the_offline_path_does(language, shape):
    kv_tokens, max_requests, prefill_tokens = shape
    engine = Engine(language, kv_tokens=kv_tokens, max_requests=max_requests, prefill_tokens=prefill_tokens)
    requests = make_requests(language)
    assert texts(complete(engine, [*requests, *requests])) == reference_answers(language) * 2
    stats = engine.stats()
    assert (stats.finished_total, stats.failed_total, stats.running, stats.queued) == (10, 0, 0, 0)
    assert stats.kv_bytes > 0 and stats.kv_tokens_reserved == 0


def test_the_other_settings_of_generation_are_those_of_the_offline_path(language):
    """The penalty, and what the model's own generation_config suppresses and forbids to end."""
    config = language.model.generation_config
    before = {key: getattr(config, key) for key in ("suppress_tokens", "begin_suppress_tokens", "min_new_tokens")}
    plain = reference_answers(language)
    try:
        config.suppress_tokens, config.begin_suppress_tokens, config.min_new_tokens = [13, 17], [5, 12, 18], 6
        lengths = [max(6, length) for length in LENGTHS]  # generate refuses less than the shortest
        expected = reference_answers(language, lengths, repetition_penalty=1.7)
        engine = Engine(language, kv_tokens=1024, max_requests=8)
        assert texts(complete(engine, make_requests(language, lengths, repetition_penalty=1.7))) == expected != plain
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def test_requests_join_and_leave_at_any_step(language):
    """The short ones that come late end long before the long one, and change nothing of it."""
    no_end = replace(make_requests(language)[4].settings, max_new_tokens=40)
    language.model.generation_config.min_new_tokens = 40
    try:
        engine = Engine(language, kv_tokens=1024, max_requests=4)
        prefix, prompt = soft_prompts(language)[4:], PROMPTS[4:]
        expected = language.generate(prefix, prompt, GenerationSettings(max_new_tokens=40))[0]
    finally:
        language.model.generation_config.min_new_tokens = None
    long = engine.add(EngineRequest(inputs_SL=make_requests(language)[4].inputs_SL, settings=no_end))
    ended, said = {}, ""
    short = []
    for step in range(60):
        if step % 5 == 0 and step < 30:
            inputs_SL = make_requests(language)[step // 5 % 4].inputs_SL
            short.append(engine.add(EngineRequest(inputs_SL=inputs_SL, settings=RequestSettings(max_new_tokens=3))))
        for number, delta in engine.step():
            said += delta.text if number == long else ""
            if delta.finish_reason:
                ended[number] = step
    # Two tokens in the step that reads the prompt, then one a step.
    assert ended[long] == 38 and said == expected
    assert [ended[number] for number in short] == [1, 6, 11, 16, 21, 26]


def test_short_requests_pass_a_long_one_that_finds_no_place_so_often(monkeypatch):
    monkeypatch.setattr("qformer.generation.batch._CAPACITY_STEP", 8)
    monkeypatch.setattr("qformer.generation.engine._MAX_OVERTAKEN", 3)
    language = tiny_language("llama")
    language.model.generation_config.eos_token_id = None
    first = make_requests(language)[0]
    engine = Engine(language, kv_tokens=96, max_requests=4)

    def add(length):
        return engine.add(replace(first, settings=RequestSettings(max_new_tokens=length)))

    running, long = add(30), add(50)  # slots of 40 and 56 tokens: two of the latter are too many
    short = [add(2) for _ in range(6)]
    ended = []
    while engine.is_busy:
        ended += [number for number, outcome in engine.step() if outcome.finish_reason]
    # Three pass; when the running one has ended and the long one runs, the others find no place beside it.
    assert ended == [*short[:3], running, long, *short[3:]]


def test_a_sampled_answer_depends_on_its_seed_alone(language):
    def sample(requests, max_requests):
        return texts(complete(Engine(language, kv_tokens=2048, max_requests=max_requests), requests))

    requests = make_requests(language, temperature=1.3, top_p=0.95, seed=4)
    alone, together = sample(requests, 1), sample([*make_requests(language), *requests], 10)
    assert together[5:] == alone
    other = sample(make_requests(language, temperature=1.3, top_p=0.95, seed=5), 1)
    assert alone != other
    narrow = sample(make_requests(language, temperature=1.3, top_p=1e-6, seed=4), 4)
    assert narrow == reference_answers(language)


def test_sampling_follows_the_probabilities():
    """4,000 requests draw with seeds of their own; the nucleus leaves out exactly the tail, as transformers cuts it."""
    from qformer.generation.requests.token_selection import GenerationRules, select_tokens

    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    probability_V = (logits_V / 0.8).softmax(0)
    rules = GenerationRules((), (), (), 0, 0, False, None)

    class Drawing:
        def __init__(self, top_p, seed):
            self.settings, self.num_inputs, self.ids = RequestSettings(temperature=0.8, top_p=top_p), 1, []
            self.generator = torch.Generator().manual_seed(seed)

    for top_p, kept in ((1.0, 5), (0.8, 2), (0.2, 1)):  # cumulated: 0.65, 0.83, ...
        rows = [Drawing(top_p, seed) for seed in range(4000)]
        drawn = torch.tensor(select_tokens(logits_V.repeat(len(rows), 1), rows, rules))
        share = torch.bincount(drawn, minlength=5) / len(drawn)
        wanted = torch.where(torch.arange(5) < kept, probability_V, 0.0)
        torch.testing.assert_close(share, wanted / wanted.sum(), atol=0.03, rtol=0)  # 4 standard deviations: 0.031


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"temperature": 1e-300}, {"top_p": 1e-46}])
def test_what_fp32_cannot_hold_takes_the_likeliest_token(language, settings):
    requests = make_requests(language, **{"temperature": 1.3, **settings})
    engine = Engine(language, kv_tokens=1024, max_requests=8)
    assert texts(complete(engine, requests)) == reference_answers(language)


def test_stop_strings_end_the_text_before_them(language):
    expected = reference_answers(language, (20,) * 5)
    requests = make_requests(language, (20,) * 5, stop=("small circle", "left"))
    for result, text in zip(
        complete(Engine(language, kv_tokens=1024, max_requests=3), requests), expected, strict=True
    ):
        cut = min((text.find(stop) for stop in ("small circle", "left") if stop in text), default=None)
        assert result.text == (text if cut is None else text[:cut]).strip()
        if cut is not None:
            assert result.finish_reason == "stop" and result.usage.completion_tokens < 20


def test_usage_counts_rows_and_tokens(language):
    (request,) = make_requests(language)[2:3]
    result, answer = (
        complete(Engine(language, kv_tokens=256, max_requests=1), [request])[0],
        reference_answers(language),
    )
    assert result.usage.prompt_tokens == len(request.inputs_SL)
    assert result.usage.completion_tokens == len(result.token_ids) <= 20
    assert language.tokenizer.decode(result.token_ids, skip_special_tokens=True).strip() == answer[2]
    assert (result.finish_reason == "stop") == (result.token_ids[-1] in language.end_ids)


def test_segments_in_any_order_and_the_prompt_alone(language):
    prefix_BNL = soft_prompts(language)
    for prefix_NL, prompt in zip(prefix_BNL, PROMPTS, strict=True):
        assert torch.equal(segment_inputs(language, [prefix_NL, prompt]), prompt_inputs(language, prefix_NL, prompt))
    chat = segment_inputs(language, ["red", prefix_BNL[0], "circle left", prefix_BNL[1], "small"])
    whole = language._text_ids("red circle left small")
    rows = language._embed(torch.tensor([*whole, 2] if language.is_encoder_decoder else whole))
    first = len(whole) - 3  # the leading token, if any, and "red"
    assert torch.equal(chat[:first], rows[:first]) and torch.equal(chat[first : first + 6], prefix_BNL[0])
    assert torch.equal(chat[first + 6 : first + 8], rows[first : first + 2])
    assert torch.equal(chat[first + 14 :], rows[first + 2 :])
    ids = text_ids(language, ["red", "circle left"])
    assert [*ids[0], *ids[1]] == whole[: first + 2] and len(ids[1]) == 2
    counted = segment_inputs(language, ["red", prefix_BNL[0], "circle left"], ids)
    assert torch.equal(counted, segment_inputs(language, ["red", prefix_BNL[0], "circle left"]))
    with pytest.raises(ValueError, match=rf"takes \[rows, {language.width}\]"):
        segment_inputs(language, [torch.zeros(2, 8)])


def test_a_cancelled_request_leaves_no_numbers_behind():
    """What its last pass wrote may be NaN, and whoever comes next looks at its slot through a mask of zeros."""
    language = tiny_language("opt")
    engine = Engine(language, kv_tokens=1024, max_requests=2, prefill_tokens=3)
    number = engine.add(make_requests(language)[2])
    engine.step()  # a part of its prompt
    layers = engine._passes.slots.layers
    assert any(tensor[0].any() for pair in layers for tensor in pair)
    engine.cancel(number)
    assert not any(tensor[0].any() for pair in layers for tensor in pair)


def test_a_model_with_a_window_of_its_own_runs_no_further_than_that():
    """GPT-Neo's local layers cut it by the number of keys, which other rows and recorded passes decide here."""
    language = tiny_language("gpt2")
    language.model.config.window_size = 48
    engine = Engine(language, kv_tokens=1024, max_requests=2)
    inputs_SL, settings = torch.zeros(40, language.width), RequestSettings(max_new_tokens=10)
    with pytest.raises(TooLongError, match="need 49 positions, the language model has 48"):
        engine.add(EngineRequest(inputs_SL=inputs_SL, settings=settings))


def test_what_cannot_run_is_refused_with_what_to_change(language):
    engine = Engine(language, kv_tokens=50, max_requests=2, max_queue=1)
    good = make_requests(language)[0]
    long = replace(good, settings=RequestSettings(max_new_tokens=60))
    with pytest.raises(TooLongError, match="kv_tokens=50|language model has 64"):
        engine.add(long)
    with pytest.raises(RequestError, match=rf"takes \[rows, {language.width}\]"):
        engine.add(replace(good, inputs_SL=torch.zeros(4, 8)))
    with pytest.raises(GenerationFailedError, match="NaN or infinity"):  # whoever asked is not to blame
        engine.add(replace(good, inputs_SL=good.inputs_SL.clone().fill_(float("inf"))))
    if not language.is_encoder_decoder:  # T5 has no last position
        with pytest.raises(TooLongError, match="need 76 positions, the language model has 64"):
            engine.add(
                replace(good, inputs_SL=torch.zeros(70, language.width), settings=RequestSettings(max_new_tokens=7))
            )
    engine.add(good)
    with pytest.raises(QueueFullError):
        engine.add(good)
    assert engine.stats().refused_total == 1


class FailsOn(torch.nn.Module):
    """In a layer's place: raises, or gives NaN, where the batch holds a marked row."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, hidden, *args, **kwargs):
        is_marked_B = (hidden.flatten(1) > 1e6).any(dim=1)
        if is_marked_B.any() and self.how == "raise":
            raise RuntimeError("boom")
        out = self.layer(hidden.clamp(max=1e3), *args, **kwargs)
        return torch.where(is_marked_B[:, None, None], torch.nan, out)


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_request_that_the_model_fails_on_fails_alone(how):
    """Also when those after it take its slot, whose values were NaN."""
    language = tiny_language("gpt2")
    expected = reference_answers(language)
    block = language.model.transformer.h[0]
    block.ln_1 = FailsOn(block.ln_1, how)
    requests = make_requests(language)
    bad = requests[2].inputs_SL.clone()
    bad[3] = 1e7
    engine = Engine(language, kv_tokens=1024, max_requests=3)
    results = complete(engine, [*requests[:2], replace(requests[2], inputs_SL=bad), *requests[3:], *requests])
    assert isinstance(results[2], GenerationFailedError)
    assert texts(results[:2] + results[3:]) == [*expected[:2], *expected[3:], *expected]
    assert engine.stats().failed_total == 1


def test_a_decode_step_that_fails_once_fails_nobody(language, monkeypatch):
    """It is repeated row by row."""
    engine = Engine(language, kv_tokens=1024, max_requests=8)
    real, calls = engine._passes.decode, []

    def sometimes(first, rows):
        calls.append(len(rows))
        if len(calls) == 4:
            real(first, rows)  # what it wrote may stay
            raise RuntimeError("boom")
        return real(first, rows)

    monkeypatch.setattr(engine._passes, "decode", sometimes)
    assert texts(complete(engine, make_requests(language))) == reference_answers(language)
    assert calls[3] > 1 and calls[4 : 4 + calls[3]] == [1] * calls[3]


def test_no_memory_for_larger_slots_fails_what_runs_and_nothing_after(language, monkeypatch):
    """Some layers have the new size then, others the old one."""
    monkeypatch.setattr("qformer.generation.batch._CAPACITY_STEP", 8)
    engine = Engine(language, kv_tokens=1024, max_requests=8)
    requests = make_requests(language, (20,) * 5)
    expected = reference_answers(language, (20,) * 5)
    running = [engine.add(request) for request in requests[:2]]
    engine.step()
    real, calls = torch.Tensor.new_zeros, []

    def short(tensor, *shape, **options):
        calls.append(shape)
        if len(calls) == 4:  # keys and values of two layers
            raise torch.OutOfMemoryError("no memory")
        return real(tensor, *shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", short)
        larger = engine.add(replace(requests[2], settings=RequestSettings(max_new_tokens=45)))
        news = dict(engine.step())
    assert news.keys() == {*running, larger} and len(calls) == 4
    assert all(isinstance(outcome, GenerationFailedError) for outcome in news.values())
    assert not engine.is_busy and engine.stats().failed_total == 3
    assert texts(complete(engine, requests)) == expected


def test_a_lost_device_is_not_taken_for_a_failure_that_passes():
    engine = Engine(tiny_language("llama"), kv_tokens=64, max_requests=1)
    engine.language.model.to("meta")  # as a GPU after an illegal access, it computes nothing
    with pytest.raises(RuntimeError):
        engine.drop_all()


def test_cancelling_frees_the_slot(language):
    engine = Engine(language, kv_tokens=128, max_requests=2)
    requests = make_requests(language, (20,) * 5)
    numbers = [engine.add(request) for request in requests]
    engine.step()
    engine.cancel(numbers[0])  # running
    engine.cancel(numbers[2])  # waiting
    engine.cancel(numbers[2])
    said = dict.fromkeys(numbers, "")
    while engine.is_busy:
        for number, delta in engine.step():
            said[number] += delta.text
    answers = reference_answers(language, (20,) * 5)
    assert [said[number] for number in numbers[3:]] == answers[3:] and answers[1].endswith(said[numbers[1]])
    assert said[numbers[2]] == "" and engine.stats().cancelled_total == 2


def test_the_budget_is_kept(language):
    """Rows of slots times their length, at every step; longer requests run fewer at a time."""
    engine = Engine(language, kv_tokens=192, max_requests=8)
    for request in make_requests(language, (20, 3, 55 if language.is_encoder_decoder else 40, 1, 7)) * 3:
        engine.add(request)
    most = 0
    while engine.is_busy:
        engine.step()
        stats, slots = engine.stats(), engine._passes.slots
        assert stats.kv_tokens_reserved <= slots.num_rows * slots.capacity <= 192
        most = max(most, stats.running)
    assert most == 3 and engine.stats().finished_total == 15


def test_models_and_settings_that_the_engine_does_not_run_are_named():
    language = tiny_language("llama")
    language.model.generation_config.bad_words_ids = [[5]]
    with pytest.raises(UserError, match="bad_words_ids"):
        Engine(language, kv_tokens=64, max_requests=1)
    with pytest.raises(UserError, match="num_beams=3"):
        RequestSettings.of(GenerationSettings(num_beams=3))
    with pytest.raises(ValueError, match="kv_tokens=0"):
        Engine(tiny_language("llama"), kv_tokens=0, max_requests=1)
    assert RequestSettings.of(GenerationSettings()).temperature == 0.0
    sampled = RequestSettings.of(GenerationSettings(top_p=0.9, temperature=0.7, seed=3, max_new_tokens=5))
    assert (sampled.temperature, sampled.top_p, sampled.seed, sampled.max_new_tokens) == (0.7, 0.9, 3, 5)
    for wrong in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"stop": ("",)},
        {"seed": 2**64},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RequestSettings(**wrong)


def test_updates_of_one_bridge_are_not_shared():
    language = tiny_language("llama")
    require_shareable(language, 2)
    Lora(language.model, LoraConfig(rank=2))
    require_shareable(language, 1)
    with pytest.raises(UserError, match="merge"):
        require_shareable(language, 2)
