"""Random pairs of image and text from a corpus, decoded in this process.

Dimensions: B pairs, F frames, C channels, Y/X pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data import schema
from pipelines.data.batches.batch import SampleBatch, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import RowLookup, training_blocks
from pipelines.data.failures import Failure
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.global_batches import StepRows
from pipelines.data.order.mixture import Corpus
from pipelines.inference.decoding import waveforms_of
from pipelines.inference.models import Waveforms


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Decoded samples of one kind."""

    pixels_BFCYX: Tensor
    """Pixels, uint8."""
    frame_valid_BF: Tensor
    """False at padding frames, which repeat others of their clip."""
    captions: list[str]
    instructions: list[str]
    """Instruction of each caption; "" where the prompt of training is used."""
    audio: Waveforms | None
    """Sound of the clips; None if the model reads none."""
    may_swap_BB: Tensor
    """True where image j is a valid negative for text i: another picture, without such a caption."""


@dataclass(slots=True)
class PairSample:
    """Random rows of a corpus; iteration decodes them.

    Args:
        corpus: Source of the rows.
        decode: Decode settings, without augmentation.
        num_rows: Number of rows, at most those of the corpus.
        batch_size: Largest batch; permutations stay within a batch.
        seed: Seed of the choice of rows and captions.
    """

    corpus: Corpus
    decode: DecodeSettings
    num_rows: int
    batch_size: int
    seed: int
    failures: list[Failure] = field(default_factory=list)
    """Failures so far."""

    def __iter__(self) -> Iterator[PairBatch]:
        lookup = RowLookup(self.corpus, seed=self.seed, is_random=False)
        rows = DecodeRows(self.decode)
        try:
            for kind, numbers in self._groups():
                batches = StepRows(numbers[None], np.zeros((1, len(numbers)), np.int64), [kind])
                (plan,) = training_blocks(batches, first_step=0, world_size=1, steps_per_block=1)
                batch = unpack(rows(lookup(plan)))
                self.failures += batch.failures
                if batch.is_valid.any():
                    yield _pairs(batch, self.corpus.take(numbers)[schema.CAPTIONS].to_pylist())
        finally:
            rows.close()

    def _groups(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Row numbers of batches: one kind each, of about equal size."""
        count = min(self.num_rows, self.corpus.num_rows)
        chosen = np.random.default_rng(self.seed).choice(self.corpus.num_rows, count, replace=False)
        kinds: dict[str, list[NDArray[np.int64]]] = {}
        for stream in self.corpus.streams("proportional"):
            is_in = (chosen >= stream.first_row) & (chosen < stream.first_row + stream.num_rows)
            kinds.setdefault(stream.kind, []).append(chosen[is_in])
        for kind, parts in kinds.items():
            numbers = np.concatenate(parts).astype(np.int64)
            if len(numbers):
                for part in np.array_split(numbers, -(-len(numbers) // self.batch_size)):
                    yield kind, part


def _pairs(batch: SampleBatch, all_captions: list[list[str]]) -> PairBatch:
    valid = np.flatnonzero(batch.is_valid).tolist()
    texts = [_plain(batch.captions[row]) for row in valid]
    described = [{_plain(text) for text in all_captions[row]} for row in valid]
    sources = [int(batch.image_ids[row]) for row in valid]
    indices = range(len(valid))
    may_swap = [[sources[i] != sources[j] and texts[i] not in described[j] for j in indices] for i in indices]
    return PairBatch(
        pixels_BFCYX=torch.from_numpy(batch.images[batch.is_valid]),
        frame_valid_BF=torch.from_numpy(batch.frame_valid[batch.is_valid]),
        audio=waveforms_of(batch),
        captions=[batch.captions[row] for row in valid],
        instructions=[batch.instructions[row] for row in valid],
        may_swap_BB=torch.tensor(may_swap),
    )


def _plain(text: str) -> str:
    """Normalise case and spaces, so that captions that differ only in these are equal."""
    return " ".join(text.lower().split())
