"""Some pairs of image and text out of a corpus, chosen at random and decoded in this process.

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
    """Samples of one kind that could be decoded."""

    pixels_BFCYX: Tensor
    """uint8."""
    frame_valid_BF: Tensor
    """False at frames that only repeat others of their clip."""
    captions: list[str]
    instructions: list[str]
    """What each caption answers; "" where the prompt of training serves."""
    audio: Waveforms | None
    """The clips' sound; None where the model reads none."""
    may_swap_BB: Tensor
    """True where text i may meet image j as a wrong one: another picture, which no such caption describes."""


@dataclass(slots=True)
class PairSample:
    """Random rows of a corpus; iterated over, it decodes them.

    Args:
        corpus: Where they come from.
        decode: How files become pixels; without chance.
        num_rows: How many to take, if there are so many.
        batch_size: Largest batch; texts and images are exchanged within one.
        seed: Decides which rows, and which of their captions.
    """

    corpus: Corpus
    decode: DecodeSettings
    num_rows: int
    batch_size: int
    seed: int
    failures: list[Failure] = field(default_factory=list)
    """Rows that could not be decoded so far."""

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
        """Row numbers of batches: of one kind each, and about equally many."""
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
    places = range(len(valid))
    may_swap = [[sources[i] != sources[j] and texts[i] not in described[j] for j in places] for i in places]
    return PairBatch(
        pixels_BFCYX=torch.from_numpy(batch.images[batch.is_valid]),
        frame_valid_BF=torch.from_numpy(batch.frame_valid[batch.is_valid]),
        audio=waveforms_of(batch),
        captions=[batch.captions[row] for row in valid],
        instructions=[batch.instructions[row] for row in valid],
        may_swap_BB=torch.tensor(may_swap),
    )


def _plain(text: str) -> str:
    """Two captions that differ in case and spaces say the same."""
    return " ".join(text.lower().split())
