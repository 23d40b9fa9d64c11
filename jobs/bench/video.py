"""Four ways to join the frames of a clip, at three lengths: time and memory of a forward and of a training step.

BERT-base widths, the encoder's 257 x 1408 tokens of each frame given, batch 1, and as many soft prompts as each way
makes; no language model and no optimizer. On a CPU in fp32 with two threads, on a GPU in bf16. Every way and length has
its own process, which builds the bridge and warms up on two frames; then the lengths of one way alternate, so that a
slow machine affects all of them alike. A process's memory is the largest that it held (on a CPU the resident
size less that before the bridge was built): weights, gradients and activations.

A training step trains all weights. Video-LLaMA keeps the Q-Former of the frames as it is, and so does our recipe:
"cascaded frozen" is that.

growth_16_to_64   time at 64 frames / time at 16, the largest over cascaded and spatio_temporal, forward and step
st_vs_cascaded    time of spatio_temporal / cascaded at 16 frames, the larger of forward and step
st_vs_cascaded_frozen       the same of a step whose cascade trains only what reads the frames' queries: far less
st_vs_cascaded_operations   the same of a forward's floating-point operations, as they run
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import cast

import torch
from torch import Tensor, multiprocessing

from jobs.bench.data_memory import resident_bytes
from jobs.bench.result import BenchResult
from pipelines.training.records.flops import StepFlops
from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.concatenate import ConcatenateConfig
from qformer.bridges.mean import MeanConfig
from qformer.bridges.spatio_temporal import SpatioTemporalConfig
from qformer.bridges.table import BridgeConfig
from qformer.config import QFormerConfig
from qformer.objectives.stage2 import Stage2

THREADS = 2
IMAGE_TOKENS = 257
LANGUAGE_WIDTH = 2048
FROZEN = "cascaded frozen"
WAYS: Mapping[str, BridgeConfig] = {
    "cascaded": CascadedConfig(freeze_frames=False),
    FROZEN: CascadedConfig(freeze_frames=True),
    "spatio_temporal": SpatioTemporalConfig(),
    "concatenate": ConcatenateConfig(),
    "mean": MeanConfig(),
}
_KINDS = ("forward", "step")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoCase:
    """Sizes and device of the measurement."""

    config: QFormerConfig = QFormerConfig(encoder_width=1408)
    image_tokens: int = IMAGE_TOKENS
    rounds: Mapping[int, int] = dataclasses.field(default_factory=lambda: {8: 3, 16: 5, 64: 5})
    """Turns by number of frames; five where a ratio is computed, so that two slow ones do not change the median."""
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class VideoTimes:
    """Figures of one way at one length."""

    seconds: Mapping[str, float]
    """Median seconds of the forward and of the step."""
    peak_bytes: int
    operations: float
    """Floating-point operations of a forward."""


def run() -> BenchResult:
    """Measure on the GPU where torch sees one, else on the CPU."""
    has_gpu = torch.cuda.is_available()
    return measure(VideoCase(device="cuda", rounds={8: 20, 16: 20, 64: 20}) if has_gpu else VideoCase())


def measure(case: VideoCase) -> BenchResult:
    """Measure one way after the other, each at all lengths."""
    found = {(name, frames): one for name in WAYS for frames, one in _in_turns(case, name).items()}
    seconds = {
        f"{name} {frames} frames {kind}": one.seconds[kind] for (name, frames), one in found.items() for kind in _KINDS
    }
    rates = {f"{name} clips/s": 1.0 / value for name, value in seconds.items()}
    rates |= {f"{name} {frames} frames peak GiB": one.peak_bytes / 2**30 for (name, frames), one in found.items()}
    return BenchResult(bench="video", seconds=seconds, ratios=_ratios(case, found), rates=rates)


def _ratios(case: VideoCase, found: Mapping[tuple[str, int], VideoTimes]) -> dict[str, float]:
    _, short, long = sorted(case.rounds)
    growth = [
        found[name, long].seconds[kind] / found[name, short].seconds[kind]
        for name in ("cascaded", "spatio_temporal")
        for kind in _KINDS
    ]
    ours, theirs, frozen = (found[name, short] for name in ("spatio_temporal", "cascaded", FROZEN))
    return {
        "growth_16_to_64": max(growth),
        "st_vs_cascaded": max(ours.seconds[kind] / theirs.seconds[kind] for kind in _KINDS),
        "st_vs_cascaded_frozen": ours.seconds["step"] / frozen.seconds["step"],
        "st_vs_cascaded_operations": ours.operations / theirs.operations,
    }


def _in_turns(case: VideoCase, name: str) -> dict[int, VideoTimes]:
    context = multiprocessing.get_context("spawn")
    pipes = {frames: context.Pipe() for frames in case.rounds}
    children = [
        context.Process(target=_take_turns, args=(child_end, case, name, frames), daemon=True)
        for frames, (_, child_end) in pipes.items()
    ]
    for child in children:
        child.start()
    for _, child_end in pipes.values():
        child_end.close()  # so that `recv` raises if a child dies
    try:
        return _run_turns({frames: ours for frames, (ours, _) in pipes.items()}, case)
    finally:
        for child in children:
            child.terminate()
            child.join()


def _run_turns(children: Mapping[int, Connection], case: VideoCase) -> dict[int, VideoTimes]:
    """Run the turns of the children."""
    for child in children.values():
        child.recv()  # wait until all are ready
    for turn in range(max(case.rounds.values())):
        for frames, child in children.items():
            if turn < case.rounds[frames]:
                child.send(True)
                child.recv()
    found = {}
    for frames, child in children.items():
        child.send(False)
        found[frames] = cast(VideoTimes, child.recv())
    return found


def _take_turns(parent: Connection, case: VideoCase, name: str, frames: int) -> None:
    """Child process: signals readiness, measures once for each True from the parent, and sends the figures at False."""
    if case.device == "cpu":
        torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    before = resident_bytes("VmRSS")
    bridge = Stage2(case.config, language_width=LANGUAGE_WIDTH, bridge=WAYS[name]).to(case.device)
    _step(bridge, _clip(case, 2))
    clip = _clip(case, frames)
    taken: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    parent.send(None)
    while parent.recv():
        for kind, call in (("forward", _forward), ("step", _step)):
            bridge.zero_grad(set_to_none=True)
            _wait(case)
            begin = time.perf_counter()
            call(bridge, clip)
            _wait(case)
            taken[kind].append(time.perf_counter() - begin)
        parent.send(None)
    peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else resident_bytes("VmHWM") - before
    flops = StepFlops(torch.device(case.device))
    flops.add((), lambda: _forward(bridge, clip))
    parent.send(VideoTimes({kind: statistics.median(values) for kind, values in taken.items()}, peak, flops.total))


def _clip(case: VideoCase, frames: int) -> Tensor:
    return torch.randn(1, frames, case.image_tokens, case.config.encoder_width, device=case.device)


@torch.no_grad()
def _forward(bridge: Stage2, clip_BFPV: Tensor) -> None:
    bridge.eval()
    with torch.autocast(clip_BFPV.device.type, dtype=torch.bfloat16, enabled=clip_BFPV.is_cuda):
        bridge(clip_BFPV)


def _step(bridge: Stage2, clip_BFPV: Tensor) -> None:
    bridge.train()
    with torch.autocast(clip_BFPV.device.type, dtype=torch.bfloat16, enabled=clip_BFPV.is_cuda):
        prompts_BNL = bridge(clip_BFPV).prompts_BNL
    prompts_BNL.float().square().mean().backward()


def _wait(case: VideoCase) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
