"""The generation engine against `transformers` generate in static batches: mixed lengths, exact numbers of tokens.

A queue of requests is answered with 1, 16 and 64 at a time. A static batch runs until its longest answer ends; the
engine fills every slot as it becomes free. Measured are the requested tokens per second, and the time from the start to
the first token of each request. The models have random weights:
OPT of a small size in fp32 with two threads on a CPU, of OPT-2.7B's size in bf16 on a GPU. The text of a
token is a letter, which costs almost nothing; tokens without text would not be streamed. Before any timing, both must
give the same tokens with the small size in fp32, where rounding makes no difference.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.bench.result import BenchResult
from qformer.generation.engine import Engine
from qformer.generation.requests.request import EngineRequest, RequestSettings
from qformer.language import LanguageModel, build_language_model
from qformer.torch_build.torchvision import import_torchvision

THREADS = 2
LENGTHS = (8, 16, 32, 64, 128)
"""Requested numbers of tokens, all equally likely."""
INPUT_ROWS = (34, 40, 48, 64)
"""Input rows: 32 soft prompts and a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCase:
    """Sizes and device of the measurement."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    concurrency: tuple[int, ...] = (1, 16, 64)
    requests_per_slot: int = 4
    """Queued requests per slot of the batch; a single slot gets as many as 4."""
    rounds: int = 3


CPU = EngineCase(hidden_size=256, num_layers=4, num_heads=4, vocab_size=2048)
OPT_2_7B = EngineCase(
    hidden_size=2560, num_layers=32, num_heads=32, vocab_size=50_272, device="cuda", dtype=torch.bfloat16, rounds=2
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one run over the queue."""

    total_s: float
    first_token_s: float
    """Mean time to the first token."""


def run() -> BenchResult:
    """Measure on the GPU if torch finds one, else on the CPU."""
    if torch.cuda.is_available():
        return measure(OPT_2_7B)
    torch.set_num_threads(THREADS)
    return measure(CPU)


def measure(case: EngineCase) -> BenchResult:
    """Time both alternately.

    Raises:
        ValueError: If they give different tokens.
    """
    small = case if case.dtype == torch.float32 else dataclasses.replace(CPU, device=case.device)
    _require_same_tokens(build_language(small), make_requests(small, 5))
    language = build_language(case)
    seconds, ratios, rates = {}, {}, {}
    for slots in case.concurrency:
        requests = make_requests(case, case.requests_per_slot * max(slots, 4))
        ways = {"engine": _engine(language, requests, slots), "transformers": _static(language, requests, slots)}
        taken: dict[str, list[Timing]] = {name: [] for name in ways}
        for round_ in range(case.rounds + 1):
            for name, way in ways.items():
                timing = way()
                if round_:
                    taken[name].append(timing)
        total = {name: statistics.median(timing.total_s for timing in timings) for name, timings in taken.items()}
        first = {name: statistics.median(t.first_token_s for t in timings) for name, timings in taken.items()}
        tokens = sum(request.settings.max_new_tokens for request in requests)
        for name in ways:
            seconds[f"{name} {slots} at a time"] = total[name]
            seconds[f"{name} {slots} first token"] = first[name]
            rates[f"{name} {slots} tokens/s"] = tokens / total[name]
        ratios[f"speedup {slots}"] = total["transformers"] / total["engine"]
        ratios[f"first token {slots}"] = first["transformers"] / first["engine"]
    return BenchResult(bench="engine", seconds=seconds, ratios=ratios, rates=rates)


def build_language(case: EngineCase) -> LanguageModel:
    """A model with random weights and no end token."""
    import_torchvision()
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=case.hidden_size,
        word_embed_proj_dim=case.hidden_size,
        ffn_dim=4 * case.hidden_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        vocab_size=case.vocab_size,
        max_position_embeddings=2048,
    )
    with torch.device(case.device):
        model = OPTForCausalLM(config).to(case.dtype)
    language = build_language_model(model, _LetterTokenizer())
    language.end_ids = []
    return language


def make_requests(case: EngineCase, count: int) -> list[EngineRequest]:
    """Requests of mixed prompts and lengths."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    requests = []
    for _ in range(count):
        inputs_SL = torch.randn(draw.choice(INPUT_ROWS), case.hidden_size, generator=generator) * 0.1
        settings = RequestSettings(max_new_tokens=draw.choice(LENGTHS))
        requests.append(EngineRequest(inputs_SL=inputs_SL.to(case.device, case.dtype), settings=settings))
    return requests


class _LetterTokenizer:
    """Stand-in for a tokenizer: every id becomes the same letter."""

    eos_token_id, pad_token_id, name_or_path = 2, 1, "none"

    def __len__(self) -> int:
        return 3

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "x" * len(ids)


class _FirstToken:
    """A streamer that records the time of the first token; the call before it has the prompt."""

    def __init__(self) -> None:
        self.num_puts = 0
        self.at_s = 0.0

    def put(self, _: Tensor) -> None:
        self.num_puts += 1
        if self.num_puts == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        return


def _engine(language: LanguageModel, requests: Sequence[EngineRequest], slots: int) -> Any:
    """Function that answers all requests on an engine with the given number of slots."""
    longest = max(INPUT_ROWS) + max(LENGTHS)
    engine = Engine(
        language,
        kv_tokens=slots * (longest + 64),
        max_requests=slots,
        max_queue=len(requests),
        prefill_tokens=max(512, 16 * max(INPUT_ROWS)),
    )

    def way() -> Timing:
        start_s = time.perf_counter()
        waiting = {engine.add(request) for request in requests}
        first_s = []
        while engine.is_busy:
            news = engine.step()
            now_s = time.perf_counter()
            for number in {number for number, _ in news} & waiting:
                first_s.append(now_s - start_s)
                waiting.discard(number)
        return Timing(time.perf_counter() - start_s, statistics.mean(first_s))

    return way


def _static(language: LanguageModel, requests: Sequence[EngineRequest], slots: int) -> Any:
    """Function that answers all requests by `generate`, in static batches."""

    def way() -> Timing:
        start_s = time.perf_counter()
        first_s = []
        for start in range(0, len(requests), slots):
            batch, streamer = requests[start : start + slots], _FirstToken()
            _generate(language, batch, streamer)
            first_s += [streamer.at_s - start_s] * len(batch)
        return Timing(time.perf_counter() - start_s, statistics.mean(first_s))

    return way


def _generate(language: LanguageModel, batch: Sequence[EngineRequest], streamer: _FirstToken | None) -> Tensor:
    rows = [request.inputs_SL for request in batch]
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    model: Any = language.model
    ids_BT: Tensor = model.generate(
        inputs_embeds=pad(rows, batch_first=True, padding_side="left"),
        attention_mask=pad(masks, batch_first=True, padding_side="left"),
        max_new_tokens=max(request.settings.max_new_tokens for request in batch),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
        streamer=streamer,
    )
    return ids_BT.cpu()


def _require_same_tokens(language: LanguageModel, requests: Sequence[EngineRequest]) -> None:
    engine = Engine(language, kv_tokens=4096, max_requests=3, max_queue=len(requests))
    numbers = [engine.add(request) for request in requests]
    tokens_of: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.is_busy:
        for number, delta in engine.step():
            if isinstance(delta, Exception):
                raise delta
            tokens_of[number] += delta.token_ids
    for number, request in zip(numbers, requests, strict=True):
        if tokens_of[number] != (expected := _generate(language, [request], None)[0].tolist()):
            raise ValueError(f"request {number}: the engine gives {tokens_of[number]}, generate {expected}")
