"""Ours against the reference schedule: one stage-1 step, forward and backward, without optimizer.

BERT-base size, 257 x 1408 image tokens, equal weights, inputs, negatives and dropout. On a CPU in fp32 with two threads
at batch 8. With a GPU in bf16 at batch 64, where ours is also compiled against the reference as it is, operations a
second are reported (`stage1_flops`), and the paper's ViT-g encodes pictures. Rounds alternate between the two; each
round has a batch of captions of its own. Before anything is timed, the losses are compared with dropout off.

Peak memory is that of a whole step over what the process held before it built the model: weights, gradients and
activations together. On a CPU a child process of each reports its largest resident size less the size before, with the
C library set to return freed tensors at once; otherwise the sizes depend on the fragmentation of its heap.
"""

import contextlib
import json
import os
import random
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, multiprocessing, nn

from jobs.bench.data_memory import resident_bytes
from jobs.bench.hf_stage1 import TEXT_LENGTH, HuggingFaceStage1
from jobs.bench.result import BenchResult
from jobs.bench.stage1_flops import step_flops
from qformer.backbones import load_vision
from qformer.bridges.qformer_bridge import QFormerBridge
from qformer.config import QFormerConfig, VisionSpec
from qformer.objectives import Negatives
from qformer.objectives.stage1 import Stage1, Stage1Batch

THREADS = 2
BERT_VOCABULARY = 30_522
PAPER = QFormerConfig(encoder_width=1408, vocab_size=BERT_VOCABULARY + 1)
IMAGE_TOKENS = 257
# Lengths of sixteen captions, used where the real ones are missing.
LENGTHS = (13, 12, 16, 11, 14, 18, 12, 10, 13, 15, 21, 12, 14, 9, 17, 13)
# Tolerance for another order of fp32 sums over 12 layers.
LOSS_GAP = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Case:
    """Sizes and device of the measurement."""

    config: QFormerConfig = PAPER
    image_tokens: int = IMAGE_TOKENS
    batch: int = 8
    rounds: int = 5
    device: str = "cpu"
    is_bf16: bool = False
    compiler: str | None = None
    """Backend of torch.compile for a second measurement of ours; None leaves it out."""
    vision: str | None = None
    """Encoder whose images per second are measured; None: none."""
    vision_batch: int = 128


def run() -> BenchResult:
    """Measure on the GPU where torch sees one, else on the CPU."""
    lengths, source = caption_lengths()
    if torch.cuda.is_available():
        case = Stage1Case(
            batch=64, rounds=20, device="cuda", is_bf16=True, compiler="inductor", vision="eva_giant_patch14_224"
        )
    else:
        case = Stage1Case()
        torch.set_num_threads(THREADS)
    print(f"{case.batch} captions a step, lengths from {source}; {'bf16' if case.is_bf16 else 'fp32'} on {case.device}")
    return measure(case, lengths)


def measure(case: Stage1Case, lengths: Sequence[int]) -> BenchResult:
    """Time both schedules in turns and take their peak memory.

    Raises:
        ValueError: If their losses differ with dropout off.
    """
    ours, reference = build(case)
    _assert_same_losses(case, ours, reference, lengths)
    models = {"ours": ours, "reference": reference}
    seconds = _alternate(case, models, lengths)
    ratios = {"speedup": seconds["reference"] / seconds["ours"]}
    if case.compiler is not None:
        assert isinstance(ours.bridge, QFormerBridge)
        ours.bridge.qformer.layers.compile(fullgraph=True, backend=case.compiler)
        again = _alternate(case, models, lengths)
        seconds["ours compiled"] = again["ours"]
        ratios = {"speedup": again["reference"] / again["ours"], "speedup eager": ratios["speedup"]}
    del ours, reference, models
    peaks = {name: peak_bytes(case, name, lengths) for name in ("ours", "reference")}
    print(", ".join(f"{name} peak {size / 2**30:.2f} GiB" for name, size in peaks.items()))
    ratios["peak_memory"] = peaks["ours"] / peaks["reference"]
    work = statistics.mean(_step_flops(case, lengths, round_) for round_ in range(1, case.rounds + 1))
    rates = {f"{name} TFLOP/s": work / seconds[name] / 1e12 for name in seconds if name != "reference"}
    if case.vision is not None:
        rates[f"{case.vision} images/s"] = encode_rate(case)
    return BenchResult(bench="stage1", seconds=seconds, ratios=ratios, rates=rates)


def encode_rate(case: Stage1Case) -> float:
    """Images per second of the frozen encoder with random weights, up to the block that is read."""
    dtype = torch.bfloat16 if case.is_bf16 else torch.float32
    encoder = load_vision(VisionSpec(cast(str, case.vision), pretrained=False), dtype=dtype).to(case.device)
    size = (case.vision_batch, 1, 3, encoder.preprocessing.height, encoder.preprocessing.width)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, device=case.device)
    taken = []
    for _ in range(case.rounds + 1):
        _wait(case)
        start = time.perf_counter()
        encoder(pixels)
        _wait(case)
        taken.append(time.perf_counter() - start)
    return case.vision_batch / statistics.median(taken[1:])


def _step_flops(case: Stage1Case, lengths: Sequence[int], seed: int) -> int:
    batch, negatives = make_batch(case, lengths, seed)
    length_B = batch.is_text_BT.sum(dim=1)
    return step_flops(case.config, length_B.tolist(), length_B[negatives.text_B].tolist(), case.image_tokens)


def build(case: Stage1Case) -> tuple[Stage1, HuggingFaceStage1]:
    """Build both models with the same weights, in training mode."""
    torch.manual_seed(0)
    ours = Stage1(case.config)
    return ours.to(case.device).train(), HuggingFaceStage1(ours).to(case.device).train()


def make_batch(case: Stage1Case, lengths: Sequence[int], seed: int) -> tuple[Stage1Batch, Negatives]:
    """Random features and ids, caption lengths drawn from `lengths`, text padded to the batch's longest."""
    length_B = torch.tensor(random.Random(seed).choices([min(n, TEXT_LENGTH) for n in lengths], k=case.batch))
    generator = torch.Generator().manual_seed(seed)
    is_text_BT = torch.arange(int(length_B.max()))[None] < length_B[:, None]
    ids_BT = torch.randint(1, case.config.vocab_size - 1, is_text_BT.shape, generator=generator)
    index_B = torch.arange(case.batch)
    tokens = (case.batch, 1, case.image_tokens, case.config.encoder_width)

    def to_device(tensor: Tensor) -> Tensor:
        return tensor.to(case.device)

    batch = Stage1Batch(
        image_BFPV=to_device(torch.randn(tokens, generator=generator)),
        input_ids_BT=to_device(ids_BT.masked_fill(~is_text_BT, 0)),
        is_text_BT=to_device(is_text_BT),
        image_ids_B=to_device(index_B),
        is_valid_B=to_device(torch.ones(case.batch, dtype=torch.bool)),
    )
    shift_B = torch.randint(1, case.batch, (2, case.batch), generator=generator)
    image_B, text_B = (index_B + shift_B) % case.batch
    return batch, Negatives(to_device(image_B), to_device(text_B), to_device(torch.ones(case.batch, dtype=torch.bool)))


def caption_lengths() -> tuple[list[int], str]:
    """Token counts of the real captions, and their source.

    A word or punctuation mark counts as one token, plus [CLS] and [SEP]: BERT's vocabulary splits rare words further,
    so real texts are slightly longer.
    """
    root = Path(os.environ.get("QFORMER_TEST_DATA") or Path(__file__).parents[2] / "../shared/data").resolve()
    file = root / "captioned" / "captions.jsonl"
    if not file.is_file():
        return list(LENGTHS), "the fixed list in the benchmark (no captioned/captions.jsonl in QFORMER_TEST_DATA)"
    with file.open(encoding="utf-8") as lines:
        captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    return [len(re.findall(r"\w+|[^\w\s]", caption)) + 2 for caption in captions], f"{len(captions)} real captions"


def peak_bytes(case: Stage1Case, name: str, lengths: Sequence[int]) -> int:
    """Peak memory of a step of `name`: weights, gradients and activations."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(sender, case, name, list(lengths)))
    with _environment("MALLOC_MMAP_THRESHOLD_", "65536"):
        child.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        child.join()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for the processes started inside."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _report_peak(sender: Connection, case: Stage1Case, name: str, lengths: list[int]) -> None:
    if case.device == "cpu":
        torch.set_num_threads(THREADS)
    # Imports of the reference are not part of a step: do them for both models before the size is read.
    build(Stage1Case(config=QFormerConfig(encoder_width=2, hidden_size=2, num_layers=1, num_heads=1, vocab_size=4)))
    before = resident_bytes("VmRSS")
    model: nn.Module = Stage1(case.config) if name == "ours" else _reference_alone(case.config)
    model.to(case.device).train()
    for seed in range(2):
        _timed_step(case, model, lengths, seed)
        model.zero_grad(set_to_none=True)
    if case.device == "cuda":
        sender.send(torch.cuda.max_memory_allocated())
    else:
        sender.send(resident_bytes("VmHWM") - before)


def _reference_alone(config: QFormerConfig) -> HuggingFaceStage1:
    """Build the reference from a model on the meta device, so that memory holds only one copy of the weights."""
    with torch.device("meta"):
        shapes = Stage1(config)
    return HuggingFaceStage1(shapes, has_weights=False)


def _timed_step(case: Stage1Case, model: nn.Module, lengths: Sequence[int], seed: int) -> float:
    batch, negatives = make_batch(case, lengths, seed)
    model.zero_grad(set_to_none=True)
    _wait(case)
    start = time.perf_counter()
    with torch.autocast(case.device, dtype=torch.bfloat16, enabled=case.is_bf16):
        losses = model(batch, negatives=negatives)
    losses.total.backward()
    _wait(case)
    return time.perf_counter() - start


def _wait(case: Stage1Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def _alternate(case: Stage1Case, models: Mapping[str, nn.Module], lengths: Sequence[int]) -> dict[str, float]:
    """Median seconds per step of each model; they alternate in every round, after a warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(case.rounds + 1):
        for name, model in models.items():
            seconds = _timed_step(case, model, lengths, round_)
            if round_:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


@torch.no_grad()
def _assert_same_losses(case: Stage1Case, ours: nn.Module, reference: nn.Module, lengths: Sequence[int]) -> None:
    batch, negatives = make_batch(case, lengths, seed=0)
    own, theirs = (model.eval()(batch, negatives=negatives) for model in (ours, reference))
    for name in ("itc", "itm", "itg"):
        first, second = float(own.terms[name]), float(theirs.terms[name])
        if abs(first - second) > LOSS_GAP:
            raise ValueError(f"{name}: ours is {first}, the reference's {second}; they no longer compute the same")
    ours.train(), reference.train()
