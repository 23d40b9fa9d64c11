"""Which row goes into which global batch: a pure function of seed and epoch, whatever the number of workers."""

import hashlib

import numpy as np
from numpy.typing import NDArray

PADDING = -1
"""Row index that fills the last batch of a kind."""


def epoch_order(kinds: NDArray[np.int64], seed: int, epoch: int, global_batch: int) -> NDArray[np.int64]:
    """Deal every row once into batches of one kind each.

    Rows are shuffled within their kind; then the batches of all kinds are shuffled among each other. Only the last
    batch of a kind may hold padding.

    Args:
        kinds: [rows] any integer code of each row's kind.
        seed: Of the run.
        epoch: 0-based.
        global_batch: Rows of one step over all workers.

    Returns:
        Row indexes [num_batches, global_batch], `PADDING` where a batch is not full.

    Raises:
        ValueError: If `global_batch` is not positive.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch={global_batch} must be positive")
    batches = []
    for code in np.unique(kinds):
        rows = np.flatnonzero(kinds == code)
        rows = rows[_shuffled(len(rows), seed, epoch, f"rows/{code}")]
        padded = np.full(-(-len(rows) // global_batch) * global_batch, PADDING, dtype=np.int64)
        padded[: len(rows)] = rows
        batches.append(padded.reshape(-1, global_batch))
    if not batches:
        return np.empty((0, global_batch), dtype=np.int64)
    together = np.concatenate(batches)
    return together[_shuffled(len(together), seed, epoch, "batches")]


def batches_per_epoch(kinds: NDArray[np.int64], global_batch: int) -> int:
    """Number of rows of `epoch_order`'s result, without making it."""
    _, counts = np.unique(kinds, return_counts=True)
    return int(sum(-(-int(count) // global_batch) for count in counts))


def rank_rows(batch: NDArray[np.int64], world_size: int) -> NDArray[np.int64]:
    """Deal one global batch to the ranks: equal runs of columns, padded to one length.

    Args:
        batch: Row indexes [G].
        world_size: Number of ranks.

    Returns:
        [world_size, ceil(G / world_size)].
    """
    width = -(-len(batch) // world_size)
    dealt = np.full((world_size, width), PADDING, dtype=np.int64)
    for rank, part in enumerate(np.array_split(batch, world_size)):
        dealt[rank, : len(part)] = part
    return dealt


def caption_index(seed: int, epoch: int, sample_id: str, num_captions: int) -> int:
    """Which of a sample's captions an epoch uses.

    Raises:
        ValueError: If there is none to choose.
    """
    if num_captions < 1:
        raise ValueError(f"sample {sample_id!r} has no caption")
    return keyed_hash("caption", seed, epoch, sample_id) % num_captions


def augmentation_seed(seed: int, epoch: int, sample_id: str) -> int:
    """Seed of a sample's random crop and flip in an epoch, 63 bits."""
    return keyed_hash("augmentation", seed, epoch, sample_id) >> 1


def keyed_hash(purpose: str, *values: int | str) -> int:
    """64-bit hash that is the same on every machine and Python version."""
    text = "\x1f".join(map(str, values)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=purpose.encode()).digest(), "little")


def _shuffled(count: int, seed: int, epoch: int, purpose: str) -> NDArray[np.int64]:
    """Permutation of range(count): row numbers sorted by their SplitMix64 hashes.

    Not numpy's Generator: its streams may change between numpy versions, and a resumed run must see the same order.
    """
    start = np.uint64(keyed_hash("order", seed, epoch, purpose))
    with np.errstate(over="ignore"):
        mixed = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable").astype(np.int64)
