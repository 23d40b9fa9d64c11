"""Which row goes into which global batch: a pure function of manifest, mixture, seed and step.

An epoch is never listed. Every step of every epoch is computed on its own, in time and memory that depend on the batch
size alone: `epoch = step // steps_per_epoch`; a permutation of the epoch's batches gives the batch of the step; that
batch is a range of the epoch's draws of one kind; a permutation of these draws mixes the sources; and a permutation of
the source's rows gives the row of each draw.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipelines.data.order.permutation import derive_keys, permute

PADDING = -1
"""Row number of the unused places in the last batch of a kind."""

_FORMAT = "order-2"
"""Version of the code below: a resumed run must not continue in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleStream:
    """The rows of one kind in one source, and how many of them an epoch takes."""

    source: int
    """Index of the source in the mixture."""
    kind: str
    first_row: int
    """Number of the first row among all rows of the mixture; the others follow."""
    num_rows: int
    draws: int
    """Rows that an epoch takes. The stream is an endless sequence of permutations, and each epoch continues where the
    last one ended, so that no row repeats before all others were drawn."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of some steps. S steps, G rows of a global batch."""

    rows_SG: NDArray[np.int64]
    """Row numbers; `PADDING` fills the end of a batch that is not full."""
    visits_SG: NDArray[np.int64]
    """Number of earlier draws of the row. Without weights that is the epoch."""
    kinds: list[str]
    """[S] the kind of all rows of each step."""


@dataclass(frozen=True)
class Order:
    """The sequence of global batches of a run. A small object whatever the corpus, cheap to send to any process.

    Args:
        streams: Streams of rows to draw from.
        seed: Seed of the run.
        global_batch: Number of rows of one step over all workers.

    Raises:
        ValueError: If there are no rows to draw, or `global_batch` is not positive.
    """

    streams: tuple[SampleStream, ...]
    seed: int
    global_batch: int
    kinds: tuple[str, ...] = field(init=False)
    """Kinds of the streams, sorted."""
    _last_batches: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    """[kinds] exclusive end of each kind's batches, before they are permuted."""

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch} must be positive")
        if any(stream.draws < 1 or stream.num_rows < 1 for stream in self.streams) or not self.streams:
            raise ValueError("an order needs streams of at least one row and one draw each")
        object.__setattr__(self, "kinds", tuple(sorted({stream.kind for stream in self.streams})))
        counts = [-(-sum(s.draws for s in self._streams_of(kind)) // self.global_batch) for kind in self.kinds]
        object.__setattr__(self, "_last_batches", np.cumsum(counts, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of an epoch."""
        return int(self._last_batches[-1])

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that an epoch draws."""
        return sum(stream.draws for stream in self.streams)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the sequence of row numbers."""
        values = (_FORMAT, self.seed, self.global_batch, *map(dataclasses.astuple, self.streams))
        return hashlib.sha256(repr(values).encode()).hexdigest()

    def at(self, steps: NDArray[np.int64]) -> StepRows:
        """Compute the batches of some steps, in any order.

        Args:
            steps: [S] 0-based numbers of steps in the run.
        """
        steps = np.asarray(steps, dtype=np.int64)
        epochs, offsets = np.divmod(steps, self.steps_per_epoch)
        numbers = permute(offsets, self.steps_per_epoch, self._keys(epochs, "batches"))
        kind_codes = np.searchsorted(self._last_batches, numbers, side="right")
        rows = np.full((len(steps), self.global_batch), PADDING, dtype=np.int64)
        visits = np.zeros_like(rows)
        for code, kind in enumerate(self.kinds):
            chosen = np.flatnonzero(kind_codes == code)
            first = 0 if code == 0 else int(self._last_batches[code - 1])
            places = (numbers[chosen] - first)[:, None] * self.global_batch + np.arange(self.global_batch)
            streams = self._streams_of(kind)
            row, column = np.nonzero(places < sum(stream.draws for stream in streams))
            at = (chosen[row], column)
            rows[at], visits[at] = self._drawn(kind, streams, places[row, column], epochs[at[0]])
        return StepRows(rows, visits, [self.kinds[code] for code in kind_codes])

    def _drawn(
        self, kind: str, streams: Sequence[SampleStream], places: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and visits at places among the epoch's draws of a kind; all [N]."""
        last_draws = np.cumsum([stream.draws for stream in streams])
        draws = permute(places, int(last_draws[-1]), self._keys(epochs, f"draws/{kind}"))
        stream_codes = np.searchsorted(last_draws, draws, side="right")
        rows, visits = np.empty_like(draws), np.empty_like(draws)
        for code, stream in enumerate(streams):
            chosen = np.flatnonzero(stream_codes == code)
            # Position in the source's endless sequence of permutations.
            positions = epochs[chosen] * stream.draws + draws[chosen] - (last_draws[code] - stream.draws)
            visits[chosen], indexes = np.divmod(positions, stream.num_rows)
            keys = self._keys(visits[chosen], f"rows/{stream.source}/{kind}")
            rows[chosen] = stream.first_row + permute(indexes, stream.num_rows, keys)
        return rows, visits

    def _keys(self, counters: NDArray[np.int64], purpose: str) -> NDArray[np.uint64]:
        return derive_keys(keyed_hash("order", self.seed, purpose), counters)

    def _streams_of(self, kind: str) -> list[SampleStream]:
        return [stream for stream in self.streams if stream.kind == kind]


def rank_columns(global_batch: int, world_size: int) -> NDArray[np.int64]:
    """Split the columns of a global batch over the ranks: consecutive ranges, padded to one length.

    Args:
        global_batch: Number of rows G.
        world_size: Number of ranks.

    Returns:
        [world_size, ceil(G / world_size)], `PADDING` where a rank has one column less than others.
    """
    columns = np.full((world_size, -(-global_batch // world_size)), PADDING, dtype=np.int64)
    for rank, part in enumerate(np.array_split(np.arange(global_batch), world_size)):
        columns[rank, : len(part)] = part
    return columns


def caption_index(seed: int, visit: int, sample_id: str, num_captions: int) -> int:
    """Index of the caption that a visit of a sample uses.

    Raises:
        ValueError: If the sample has none.
    """
    if num_captions < 1:
        raise ValueError(f"sample {sample_id!r} has no caption")
    return keyed_hash("caption", seed, visit, sample_id) % num_captions


def augmentation_seed(seed: int, visit: int, sample_id: str) -> int:
    """Seed of a sample's random crop and flip in a visit, 63 bits."""
    return keyed_hash("augmentation", seed, visit, sample_id) >> 1


def keyed_hash(purpose: str, *values: int | str) -> int:
    """64-bit hash that is the same on every machine and Python version."""
    text = "\x1f".join(map(str, values)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose.encode()).digest(), "little")
