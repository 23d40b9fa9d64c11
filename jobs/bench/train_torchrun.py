"""The training benchmark's peer: plain DDP under torchrun, with a torch DataLoader, around the same model.

`torchrun … -m jobs.bench.train_torchrun FILE`, where FILE holds a `PeerCase` as JSON. The last line of the
first rank is a JSON object: seconds of a step and, measured on a batch in memory, of the frozen encoder and of a step
without it.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pipelines.data.media.transforms import resize_and_crop
from pipelines.training.step.optim import build_optimizer
from qformer.backbones import VisionEncoder, load_vision
from qformer.config import QFormerConfig, VisionSpec
from qformer.objectives.stage1 import Stage1, Stage1Batch
from qformer.preprocessing import Preprocessing
from qformer.text import TextTokenizer, load_text_tokenizer

_REPEATS = 10
"""Repetitions of the measurements in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerCase:
    """Data and settings of the peer."""

    paths: list[str]
    captions: list[str]
    vision: str
    tokenizer: str
    max_text_tokens: int
    qformer: dict[str, Any]
    batch_per_rank: int
    warm_up: int
    timed: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    clip_norm: float
    loader_workers: int = 1

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.warm_up + self.timed


class _Pairs(Dataset[tuple[Tensor, int]]):
    """Pictures, decoded by Pillow at full size and fitted to the encoder's input, with their row."""

    def __init__(self, paths: list[str], preprocessing: Preprocessing, num_rows: int) -> None:
        self._paths, self._preprocessing, self._num_rows = paths, preprocessing, num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = index % len(self._paths)
        with Image.open(self._paths[row]) as file:
            return torch.from_numpy(resize_and_crop(file.convert("RGB"), self._preprocessing)), row


class _PeerTrainer:
    """Model, optimizer and the same step as ours: forward, backward, clip, update."""

    def __init__(self, case: PeerCase) -> None:
        self.case = case
        self.encoder: VisionEncoder = load_vision(VisionSpec(case.vision, pretrained=False))
        self.tokenizer: TextTokenizer = load_text_tokenizer(case.tokenizer, case.max_text_tokens)
        config = QFormerConfig(
            encoder_width=self.encoder.width, vocab_size=self.tokenizer.vocab_size, has_lm_head=True, **case.qformer
        )
        torch.manual_seed(0)
        self.trainables = Stage1(config)
        self.model = DistributedDataParallel(self.trainables)
        self.optimizer = build_optimizer(self.trainables, weight_decay=case.weight_decay, betas=case.betas)
        for group in self.optimizer.param_groups:
            group["lr"] = case.learning_rate

    def encode(self, images_BCYX: Tensor) -> Tensor:
        """Tokens tokens_BFPV of the frozen encoder."""
        tokens: Tensor = self.encoder(images_BCYX[:, None])
        return tokens.float()

    def step(self, tokens_BFPV: Tensor, row_B: Tensor) -> None:
        """Run one update."""
        ids_BT, mask_BT, _ = self.tokenizer.encode([self.case.captions[row] for row in row_B.tolist()])
        padding = (0, self.case.max_text_tokens - ids_BT.shape[1])  # ranks exchange texts, which need equal lengths
        batch = Stage1Batch(
            image_BFPV=tokens_BFPV,
            input_ids_BT=nn.functional.pad(ids_BT, padding),
            is_text_BT=nn.functional.pad(mask_BT, padding),
            image_ids_B=row_B,
            is_valid_B=torch.ones(len(row_B), dtype=torch.bool),
        )
        self.model(batch).total.backward()
        nn.utils.clip_grad_norm_(self.trainables.parameters(), self.case.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main(path: str) -> None:
    """Train, measure, and print the figures on the first rank."""
    case = PeerCase(**json.loads(Path(path).read_text()))
    distributed.init_process_group("gloo")
    try:
        trainer = _PeerTrainer(case)
        rows = case.steps * case.batch_per_rank * distributed.get_world_size()
        dataset = _Pairs(case.paths, trainer.encoder.preprocessing, rows)
        loader = DataLoader(
            dataset, case.batch_per_rank, sampler=DistributedSampler(dataset), num_workers=case.loader_workers
        )
        arrivals = []
        for images_BCYX, row_B in loader:
            tokens_BFPV = trainer.encode(images_BCYX)
            trainer.step(tokens_BFPV, row_B)
            arrivals.append(time.perf_counter())
        figures = {
            "step_s": (arrivals[-1] - arrivals[case.warm_up - 1]) / case.timed,
            "encode_s": _repeat_seconds(lambda: trainer.encode(images_BCYX)),
            "train_s": _repeat_seconds(lambda: trainer.step(tokens_BFPV, row_B)),
        }
        if distributed.get_rank() == 0:
            print(json.dumps(figures))
    finally:
        distributed.destroy_process_group()


def as_json(case: PeerCase) -> str:
    """Serialise a case for `main`."""
    return json.dumps(dataclasses.asdict(case))


def _repeat_seconds(work: Callable[[], object]) -> float:
    """Mean seconds per repetition, with all ranks running."""
    work()
    distributed.barrier()
    begun_s = time.perf_counter()
    for _ in range(_REPEATS):
        work()
    distributed.barrier()
    return (time.perf_counter() - begun_s) / _REPEATS


if __name__ == "__main__":
    main(sys.argv[1])
