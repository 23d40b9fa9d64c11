import pickle
import tracemalloc

import numpy as np
import pytest

from pipelines.data.order.global_batches import (
    PADDING,
    Order,
    SampleStream,
    augmentation_seed,
    caption_index,
    rank_columns,
)

PINNED = [[4, 6, 1, 2], [7, 3, 5, 0]]


def corpus_order(images=42, videos=11, seed=0, global_batch=8):
    streams = [("image", 0, images), ("video", images, videos)]
    return Order(
        tuple(
            SampleStream(source=0, kind=kind, first_row=first, num_rows=rows, draws=rows)
            for kind, first, rows in streams
            if rows
        ),
        seed,
        global_batch,
    )


def epoch_of(order, epoch):
    return order.at(np.arange(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch))


@pytest.mark.parametrize("global_batch", [1, 4, 7, 64])
def test_every_row_is_seen_once_in_batches_of_one_kind(global_batch):
    order = corpus_order(global_batch=global_batch)
    assert order.steps_per_epoch == -(-42 // global_batch) + -(-11 // global_batch)
    for epoch in (0, 2):
        batches = epoch_of(order, epoch)
        seen = batches.rows_SG[batches.rows_SG != PADDING]
        assert sorted(seen.tolist()) == list(range(53)) and order.rows_per_epoch == 53
        assert set(batches.visits_SG[batches.rows_SG != PADDING].tolist()) == {epoch}
        for rows, kind in zip(batches.rows_SG, batches.kinds, strict=True):
            assert {"image" if row < 42 else "video" for row in rows[rows != PADDING]} == {kind}


def test_only_the_last_batch_of_a_kind_is_padded_and_at_its_end():
    rows_SG = epoch_of(corpus_order(), 0).rows_SG
    padded = [rows for rows in rows_SG if (rows == PADDING).any()]
    assert len(padded) == 2
    assert sum((rows == PADDING).sum() for rows in padded) == (48 - 42) + (16 - 11)
    for rows in padded:
        assert (np.diff((rows == PADDING).astype(int)) >= 0).all()


def test_order_depends_on_seed_and_epoch_alone():
    def rows(seed, epoch):
        return epoch_of(corpus_order(seed=seed), epoch).rows_SG.tolist()

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1) and rows(0, 0) != rows(1, 0) and rows(0, 1) != rows(1, 0)


def test_order_is_pinned():
    """A resumed run continues the order that an older version of the code began."""
    order = corpus_order(images=8, videos=0, seed=1, global_batch=4)
    assert order.at(np.array([4, 5])).rows_SG.tolist() == PINNED


def test_any_step_is_known_by_itself():
    order = pickle.loads(pickle.dumps(corpus_order()))
    everything = order.at(np.arange(3 * order.steps_per_epoch))
    for step in (17, 0, 20, 7):
        alone = order.at(np.array([step]))
        np.testing.assert_array_equal(alone.rows_SG[0], everything.rows_SG[step])
        np.testing.assert_array_equal(alone.visits_SG[0], everything.visits_SG[step])
        assert alone.kinds == [everything.kinds[step]]


def test_a_step_of_a_huge_corpus_costs_its_batch():
    order = corpus_order(images=9 * 10**14, videos=10**14, global_batch=2048)
    order.at(np.array([0]))
    tracemalloc.start()
    rows = order.at(np.array([10**15])).rows_SG
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(rows)) == 2048 and rows.min() >= 0 and rows.max() < 10**15
    assert peak_bytes < 2 * 1024**2


def test_rows_are_well_mixed():
    first = epoch_of(corpus_order(images=10_000, videos=0, global_batch=1000), 0).rows_SG
    assert abs(first.mean(axis=1) - 5000).max() < 400  # 4.4 standard errors of the mean of 1000 uniform draws


def weighted(draws, sizes=(10, 100), seed=3, global_batch=4):
    streams, first = [], 0
    for source, (size, drawn) in enumerate(zip(sizes, draws, strict=True)):
        streams.append(SampleStream(source=source, kind="image", first_row=first, num_rows=size, draws=drawn))
        first += size
    return Order(tuple(streams), seed, global_batch)


def test_weights_are_exact_and_no_row_comes_again_before_all_others():
    """25 draws an epoch of 10 rows, 30 of 100: over four epochs 10 x 10 and 1 x 100 + 20."""
    order = weighted((25, 30))
    epochs = [epoch_of(order, epoch) for epoch in range(4)]
    drawn = [batches.rows_SG[batches.rows_SG != PADDING] for batches in epochs]
    assert [((rows < 10).sum(), (rows >= 10).sum()) for rows in drawn] == [(25, 30)] * 4
    counts = np.bincount(np.concatenate(drawn), minlength=110)
    assert (counts[:10] == 10).all()
    assert sorted(counts[10:].tolist()) == [1] * 80 + [2] * 20
    for rows in drawn:  # two whole rounds and half a one
        assert set(np.bincount(rows[rows < 10], minlength=10).tolist()) == {2, 3}
    first_three = np.concatenate(drawn[:3])
    assert len(set(first_three[first_three >= 10].tolist())) == 90
    visits = np.concatenate([b.visits_SG[b.rows_SG != PADDING] for b in epochs])
    pairs = set(zip(np.concatenate(drawn).tolist(), visits.tolist(), strict=True))
    assert len(pairs) == len(visits), "a visit is of one row once"


def test_sources_are_mixed_within_batches():
    order = weighted((500, 500), sizes=(500, 500), global_batch=100)
    shares = (epoch_of(order, 0).rows_SG < 500).mean(axis=1)
    assert shares.min() > 0.3 and shares.max() < 0.7 and len(set(shares)) > 3


def test_another_source_does_not_change_which_rows_a_source_gives():
    alone, together = weighted((40,), sizes=(100,)), weighted((40, 50), sizes=(100, 50))
    for epoch in range(3):
        given = [epoch_of(order, epoch).rows_SG.ravel() for order in (alone, together)]
        own = [sorted(rows[(rows != PADDING) & (rows < 100)].tolist()) for rows in given]
        assert own[0] == own[1] and len(own[0]) == 40


def test_the_fingerprint_tells_orders_apart():
    orders = [weighted((25, 30)), weighted((25, 31)), weighted((25, 30), seed=4), weighted((25, 30), global_batch=5)]
    assert len({order.fingerprint for order in orders}) == 4
    assert weighted((25, 30)).fingerprint == orders[0].fingerprint


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 64])
def test_the_global_batch_is_the_same_for_any_number_of_workers(world_size):
    dealt = rank_columns(8, world_size)
    assert dealt.shape == (world_size, -(-8 // world_size))
    assert dealt[dealt != PADDING].tolist() == list(range(8))


def test_evenly_divided_batches_are_cut_into_runs():
    assert rank_columns(6, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rank_columns(4, 3).tolist() == [[0, 1], [2, PADDING], [3, PADDING]]


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ValueError, match="global_batch=0"):
        corpus_order(global_batch=0)
    with pytest.raises(ValueError, match="at least one row"):
        Order((), 0, 4)


def test_captions_are_a_function_of_seed_visit_and_sample():
    drawn = [caption_index(0, visit, "s1", 5) for visit in range(200)]
    assert drawn == [caption_index(0, visit, "s1", 5) for visit in range(200)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert drawn != [caption_index(1, visit, "s1", 5) for visit in range(200)]
    with pytest.raises(ValueError, match="s1"):
        caption_index(0, 0, "s1", 0)


def test_augmentation_seeds_differ_and_fit_an_int64():
    seeds = {augmentation_seed(0, visit, f"s{row}") for visit in range(10) for row in range(100)}
    assert len(seeds) == 1000 and max(seeds) < 2**63
