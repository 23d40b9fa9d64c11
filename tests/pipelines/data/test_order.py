import numpy as np
import pytest

from pipelines.data.order import (
    PADDING,
    augmentation_seed,
    batches_per_epoch,
    caption_index,
    epoch_order,
    rank_rows,
)

PINNED = [[5, 6, 2, 1], [0, 7, 3, 4]]
KINDS = np.array([0] * 37 + [1] * 11 + [0] * 5)


@pytest.mark.parametrize("global_batch", [1, 4, 7, 64])
def test_every_row_is_seen_once_in_batches_of_one_kind(global_batch):
    order = epoch_order(KINDS, seed=3, epoch=2, global_batch=global_batch)
    assert len(order) == batches_per_epoch(KINDS, global_batch)
    seen = order[order != PADDING]
    assert sorted(seen.tolist()) == list(range(len(KINDS)))
    for batch in order:
        assert len(set(KINDS[batch[batch != PADDING]].tolist())) == 1


def test_only_the_last_batch_of_a_kind_is_padded():
    order = epoch_order(KINDS, seed=0, epoch=0, global_batch=8)
    padded = [batch for batch in order if (batch == PADDING).any()]
    assert len(padded) == 2
    assert sum((batch == PADDING).sum() for batch in padded) == (48 - 42) + (16 - 11)


def test_order_depends_on_seed_and_epoch_alone():
    orders = [epoch_order(KINDS, seed, epoch, 8).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_order_is_pinned():
    """A resumed run continues the order that an older version of the code began."""
    assert epoch_order(np.zeros(8, dtype=np.int64), seed=1, epoch=2, global_batch=4).tolist() == PINNED


def test_rows_are_well_mixed():
    first = epoch_order(np.zeros(10_000, dtype=np.int64), 0, 0, 1000)
    means = first.mean(axis=1)
    assert abs(means - 5000).max() < 400  # 4.4 standard errors of the mean of 1000 uniform draws


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_global_batch_is_the_same_for_any_number_of_workers(world_size):
    for batch in epoch_order(KINDS, 0, 0, 8):
        dealt = rank_rows(batch, world_size)
        assert dealt.shape == (world_size, -(-8 // world_size))
        assert sorted(dealt[dealt != PADDING].tolist()) == sorted(batch[batch != PADDING].tolist())


def test_evenly_divided_batches_are_cut_into_runs():
    assert rank_rows(np.arange(6), 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rank_rows(np.arange(4), 3).tolist() == [[0, 1], [2, PADDING], [3, PADDING]]


def test_captions_are_a_function_of_seed_epoch_and_sample():
    drawn = [caption_index(0, epoch, "s1", 5) for epoch in range(200)]
    assert drawn == [caption_index(0, epoch, "s1", 5) for epoch in range(200)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert drawn != [caption_index(1, epoch, "s1", 5) for epoch in range(200)]
    with pytest.raises(ValueError, match="s1"):
        caption_index(0, 0, "s1", 0)


def test_augmentation_seeds_differ_and_fit_an_int64():
    seeds = {augmentation_seed(0, epoch, f"s{row}") for epoch in range(10) for row in range(100)}
    assert len(seeds) == 1000 and max(seeds) < 2**63
