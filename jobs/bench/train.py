"""Training through Ray against plain DDP under torchrun with a torch DataLoader: the same model on the same cores.

Two CPU ranks of 16 samples a step; 640x480 JPEGs; `vit_tiny_patch16_224` with random weights, frozen; a Q-Former of 4
layers, 256 wide, with 16 queries. Ours decodes through Ray Data; the peer with Pillow in one DataLoader process a rank.
In the same turns ours trains on a feature cache. This measures the time it waits for data without decoding, and its
samples per second relative to a step without the encoder, which the peer measures with tensors in memory. The peer is
plain: it has neither memory reuse across steps nor in-place gradients, which are part of our path
(`pipelines/training/group/launch.py`, `jobs/train/worker.py`).
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from jobs.bench.data_media import write_jpegs
from jobs.bench.result import BenchResult
from jobs.bench.train_torchrun import PeerCase, as_json
from jobs.data import features
from jobs.settings.corpus import FeaturesSettings
from jobs.settings.data import DataSettings, TrainDataSettings
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.train import TrainSettings
from jobs.train import job as train
from jobs.train.inputs import TOKENIZER_FOLDER
from pipelines.data import schema
from pipelines.data.corpus.manifest import write_table
from pipelines.training.records.metrics_log import read_metrics
from qformer.config import QFormerSizes, VisionSpec

REPOSITORY = Path(__file__).parents[2]
VISION = "vit_tiny_patch16_224"
QFORMER = QFormerSizes(
    hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, num_queries=16, embed_dim=256
)
WORDS = (
    "a",
    "small",
    "large",
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "house",
    "tree",
    "car",
    "stands",
    "on",
    "the",
    "hill",
)
MIN_SHARE = 1e-6
"""Value for no waiting at all, because figures of a benchmark must be positive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCase:
    """Sizes of the measurement."""

    vision: str = VISION
    qformer: QFormerSizes = field(default=QFORMER)
    workers: int = 2
    batch_per_rank: int = 16
    warm_up: int = 10
    timed: int = 60
    rounds: int = 3
    """Rounds; the median counts, because equal runs differ by about 5 % on shared cores."""
    jpegs: int = 512
    jpeg_size: tuple[int, int] = (640, 480)
    jpeg_bytes: int = 60_000

    @property
    def batch_size(self) -> int:
        """Samples of one step over all ranks."""
        return self.workers * self.batch_per_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Steady state of one run."""

    samples_per_s: float
    data_wait_share: float


def run() -> BenchResult:
    """Measure at full size."""
    return measure(TrainCase())


def measure(case: TrainCase) -> BenchResult:
    """Measure ours, the peer, and ours on a cache alternately."""
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as folder:
        root = Path(folder)
        paths = write_jpegs(root / "jpegs", case.jpegs, case.jpeg_size, case.jpeg_bytes)
        captions = [" ".join(WORDS[(7 * row + index) % len(WORDS)] for index in range(10)) for row in range(case.jpegs)]
        manifest = _write_manifest(root, paths, captions)
        cache = str(root / "features")
        data = DataSettings(manifest=manifest)
        features.main(FeaturesSettings(output=cache, vision=VisionSpec(case.vision, pretrained=False), data=data))
        ours, cached, peers = [], [], []
        for turn in range(case.rounds):
            settings = _settings(case, manifest, root / f"run{turn}")
            ours.append(_train(settings, case))
            peers.append(_peer(case, settings, paths, captions, root))
            cached.append(_train(_settings(case, manifest, root / f"cached{turn}", features=cache), case))
            print(f"round {turn + 1}: {_summary(case, ours[-1], cached[-1], peers[-1])}")
    seconds = {name: statistics.median(peer[name] for peer in peers) for name in peers[0]}
    rounds = list(zip(ours, cached, peers, strict=True))
    return BenchResult(
        bench="train",
        seconds={
            "step, ours": statistics.median(case.batch_size / one.samples_per_s for one in ours),
            "step, torchrun": seconds["step_s"],
            "encoder alone": seconds["encode_s"],
            "step without encoder": seconds["train_s"],
            "step, ours, cached": statistics.median(case.batch_size / one.samples_per_s for one in cached),
        },
        ratios={
            "ray_vs_torchrun": statistics.median(_share(case, one, peer["step_s"]) for one, _, peer in rounds),
            "data_wait_share": max(statistics.median(one.data_wait_share for one in cached), MIN_SHARE),
            "cache_vs_ceiling": statistics.median(_share(case, one, peer["train_s"]) for _, one, peer in rounds),
        },
    )


def _share(case: TrainCase, run: _Run, step_s: float) -> float:
    """Samples/s of a run relative to steps of `step_s`."""
    return run.samples_per_s * step_s / case.batch_size


def _summary(case: TrainCase, ours: _Run, cached: _Run, peer: dict[str, float]) -> str:
    return (
        f"ours {ours.samples_per_s:.1f} samples/s, {_share(case, ours, peer['step_s']):.2f} x torchrun's; with a cache "
        f"{cached.samples_per_s:.1f}, {_share(case, cached, peer['train_s']):.2f} x what a step without the encoder "
        f"allows; waiting for data {ours.data_wait_share:.1%} and {cached.data_wait_share:.1%}"
    )


def _settings(case: TrainCase, manifest: str, output: Path, features: str | None = None) -> TrainSettings:
    return TrainSettings(
        output=str(output),
        stage=1,
        model=ModelSettings(vision=VisionSpec(case.vision, pretrained=False), tokenizer="corpus", qformer=case.qformer),
        data=TrainDataSettings(manifest=manifest, features=features),
        optim=OptimSettings(warmup_steps=0),
        steps=case.warm_up + case.timed,
        batch_size=case.batch_size,
        workers=case.workers,
        log_every=case.warm_up,
        checkpoint_every=case.warm_up + case.timed,
    )


def _train(settings: TrainSettings, case: TrainCase) -> _Run:
    """Train as `qformer train` does, and read its metrics after the warm-up."""
    train.main(settings)
    windows = [record for record in read_metrics(settings.output) if record["step"] > case.warm_up]
    samples = case.warm_up * case.batch_size
    seconds = [samples / window["samples_per_s"] for window in windows]
    waited_s = sum(s * window["data_wait_share"] for s, window in zip(seconds, windows, strict=True))
    return _Run(
        samples_per_s=samples * len(windows) / sum(seconds),
        data_wait_share=waited_s / sum(seconds),
    )


def _peer(
    case: TrainCase, settings: TrainSettings, paths: list[str], captions: list[str], folder: Path
) -> dict[str, float]:
    """Figures of the peer, with the tokenizer of our run."""
    optim = settings.optim
    file = folder / "peer.json"
    file.write_text(
        as_json(
            PeerCase(
                paths=paths,
                captions=captions,
                vision=case.vision,
                tokenizer=str(Path(settings.output) / TOKENIZER_FOLDER),
                max_text_tokens=settings.model.max_text_tokens,
                qformer=dataclasses.asdict(case.qformer),
                batch_per_rank=case.batch_per_rank,
                warm_up=case.warm_up,
                timed=case.timed,
                learning_rate=optim.learning_rate,
                weight_decay=optim.weight_decay,
                betas=optim.betas,
                clip_norm=optim.clip_norm,
            )
        )
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.workers)]
    done = subprocess.run(
        [*launcher, "-m", "jobs.bench.train_torchrun", str(file)],
        cwd=REPOSITORY,
        # One thread per rank, as in Ray Train.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _write_manifest(folder: Path, paths: list[str], captions: list[str]) -> str:
    rows = [
        {
            schema.SAMPLE_ID: f"s{row}",
            schema.MEDIA: path,
            schema.KIND: schema.IMAGE,
            schema.CAPTIONS: [caption],
            schema.SPLIT: "train",
        }
        for row, (path, caption) in enumerate(zip(paths, captions, strict=True))
    ]
    file = str(folder / "manifest.parquet")
    write_table(pa.Table.from_pylist(rows, schema=schema.MANIFEST_SCHEMA), file)
    return file
