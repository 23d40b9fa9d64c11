"""Whole training steps of stage 1 as in `qformer train`, on batches in memory: pixels, and cached features.

The trainer's own loop runs: frozen encoder (or not), forward, backward, clipping, AdamW. No Ray and no decoding. On a
GPU in bf16, with layers as they are and compiled: ViT-g with random weights and a Q-Former of BERT-base size, against
the images a second at which BLIP-2's plain schedule would take 40 % of an H200's peak. Elsewhere in fp32 at the size of
the training benchmark, without an estimate to compare with.

MFU counts the operations as they run, on real text tokens alone, over the device's dense 16-bit peak.
"""

import dataclasses
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.bench.result import BenchResult
from jobs.bench.stage1 import BERT_VOCABULARY, THREADS, caption_lengths
from pipelines.data.batches.batch import SampleBatch
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import QueryCollapseMonitor
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.model_choice import ModelChoice
from pipelines.training.step.guard import StepGuard
from pipelines.training.step.loop import Hooks, Loop, LoopSettings
from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import build_optimizer
from pipelines.training.step.precision import Precision, PrecisionName
from qformer.backbones import VisionEncoder
from qformer.config import QFormerSizes, VisionSpec
from qformer.torch_build.torchvision import import_torchvision

ESTIMATES = {"uncached": 510, "cached": 1670}
"""Images a second on one H200 at 40 % of its peak."""
MAX_TEXT_TOKENS = 32
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """Sizes and device of the measurement."""

    vision: str
    qformer: QFormerSizes = QFormerSizes()
    vocabulary: int = BERT_VOCABULARY
    batch: int
    warm_up: int
    timed: int
    """Timed steps; a multiple of `warm_up`, so that all logged windows have the same length."""
    device: str = "cpu"
    precision: PrecisionName = "fp32"
    is_compiled: bool = False


GPU = StepCase(
    vision="eva_giant_patch14_224",
    batch=256,
    warm_up=10,
    timed=30,
    device="cuda",
    precision="bf16",
    is_compiled=True,
)
CPU = StepCase(
    vision="vit_tiny_patch16_224",
    qformer=QFormerSizes(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, num_queries=16),
    vocabulary=2000,
    batch=16,
    warm_up=3,
    timed=9,
)


def run() -> BenchResult:
    """Measure on the GPU where torch sees one, else on the CPU."""
    if torch.cuda.is_available():
        return measure(GPU)
    torch.set_num_threads(THREADS)
    return measure(CPU)


def measure(case: StepCase) -> BenchResult:
    """Time steps on pixels, then on features."""
    lengths, source = caption_lengths()
    print(f"{case.batch} images a step, {case.precision} on {case.device}, caption lengths from {source}")
    texts = _captions(case, lengths)
    run = _training_run(case)
    inputs = _inputs(case, run)
    seconds, ratios, rates = {}, {}, {}
    for kind, images in inputs.items():
        if kind == "cached":
            _drop_encoder(run)
        for stance, name in _stances(case, kind).items():
            with torch.compiler.set_stance(stance):
                logged = _steps(case, run, images, texts)
            seconds[f"step, {name}"] = case.batch / logged["samples_per_s"]
            rates[f"{name} images/s"] = logged["samples_per_s"]
            rates[f"{name} TFLOP/s"] = logged["tflops_per_s"]
            if "mfu" in logged:
                ratios[f"{name} mfu"] = logged["mfu"]
                ratios[f"{name} vs_estimate"] = logged["samples_per_s"] / ESTIMATES[kind]
            print(f"{name}: {logged['samples_per_s']:.1f} images/s")
    return BenchResult(bench="step", seconds=seconds, ratios=ratios, rates=rates)


def _stances(case: StepCase, kind: str) -> dict[str, str]:
    """Names of the figures by stance of the compiler."""
    plain = {"force_eager": kind}
    return {**plain, "default": f"{kind} compiled"} if case.is_compiled else plain


def _training_run(case: StepCase) -> TrainingRun:
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as folder:
        _write_tokenizer(case.vocabulary, Path(folder))
        return TrainingRun(
            _choice(case, folder),
            torch.device(case.device),
            precision=case.precision,
            seed=0,
            init_from=None,
            is_compiled=case.is_compiled,
        )


def _inputs(case: StepCase, run: TrainingRun) -> dict[str, NDArray[Any]]:
    """Random pixels for the run's encoder, and random features of its shape."""
    encoder, noise = cast(VisionEncoder, run.frozen["vision"]), np.random.default_rng(0)
    pixels = (case.batch, 1, 3, encoder.preprocessing.height, encoder.preprocessing.width)
    tokens = (case.batch, 1, encoder.num_tokens, encoder.width)
    return {
        "uncached": noise.integers(0, 256, pixels, dtype=np.uint8),
        "cached": noise.standard_normal(tokens, dtype=np.float32).astype(np.float16),
    }


def _drop_encoder(run: TrainingRun) -> None:
    """Remove the encoder, so that the run reads cached features."""
    run.encoders.modules.clear()
    run.frozen.clear()


def _steps(case: StepCase, run: TrainingRun, images: NDArray[Any], texts: list[list[str]]) -> dict[str, float]:
    """Train, and return the mean of the loop's log after the warm-up."""
    device = torch.device(case.device)
    logged: list[dict[str, float]] = []
    steps = case.warm_up + case.timed
    loop = Loop(
        stage=run.stage,
        call=run.stage.trainables,
        optimizer=build_optimizer(run.stage.trainables, weight_decay=0.05, betas=(0.9, 0.98)),
        objective=Objective(run.stage.terms, {}),
        precision=Precision(case.precision, device),
        accounting=Accounting(),
        settings=LoopSettings(
            steps=steps,
            steps_per_epoch=steps,
            rows_per_epoch=steps * case.batch,
            learning_rate=1e-4,
            min_learning_rate=1e-5,
            warmup_steps=steps,
            clip_norm=1.0,
            checkpoint_every=steps + 1,
            log_every=case.warm_up,
            seed=0,
            max_quarantine_share=0.0,
        ),
        guard=StepGuard(1, print, print),
        queries=QueryCollapseMonitor(print),
        flops=StepFlops(device),
        hooks=Hooks(log=logged.append),
    )
    loop.run(_batches(case, images, texts), 0)
    windows = [values for values in logged if values["step"] > case.warm_up]
    names = [name for name in ("samples_per_s", "tflops_per_s", "mfu") if name in windows[0]]
    # The windows have the same length, so the harmonic mean of rates gives the mean seconds per step.
    return {name: len(windows) / sum(1 / values[name] for values in windows) for name in names}


def _batches(case: StepCase, images: NDArray[Any], texts: list[list[str]]) -> Iterator[SampleBatch]:
    """Batches of the same pictures with different captions, from pinned memory on a GPU."""
    memory = torch.from_numpy(images)
    if case.device == "cuda":
        memory = memory.pin_memory()
    first = SampleBatch(
        step=0,
        rank=0,
        sample_ids=[f"s{row}" for row in range(case.batch)],
        captions=texts[0],
        image_ids=np.arange(case.batch),
        is_valid=np.ones(case.batch, dtype=np.bool_),
        images=memory.numpy(),
        failures=[],
        frame_valid=np.ones((case.batch, 1), dtype=np.bool_),
    )
    for step, captions in enumerate(texts):
        yield dataclasses.replace(first, step=step, captions=captions)


def _choice(case: StepCase, tokenizer: str) -> ModelChoice:
    return ModelChoice(
        stage=1,
        vision=VisionSpec(case.vision, pretrained=False),
        language=None,
        tokenizer=tokenizer,
        max_text_tokens=MAX_TEXT_TOKENS,
        prompt="",
        num_frames=1,
        qformer=case.qformer,
    )


def _captions(case: StepCase, lengths: list[int]) -> list[list[str]]:
    """Captions of every step, with the lengths of real ones."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(case.vocabulary - len(_SPECIAL))]

    def caption() -> str:
        return " ".join(draw.choices(words, k=min(draw.choice(lengths), MAX_TEXT_TOKENS) - 2))  # [CLS] and [SEP]

    return [[caption() for _ in range(case.batch)] for _ in range(case.warm_up + case.timed)]


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write a BERT tokenizer with a vocabulary of the given size."""
    import_torchvision()
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    words = [*_SPECIAL, *(f"w{number}" for number in range(vocabulary - len(_SPECIAL)))]
    BertWordPieceTokenizer({word: number for number, word in enumerate(words)}).save(str(folder / "tokenizer.json"))
    BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(str(folder))
