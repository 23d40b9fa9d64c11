import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pipelines.data.order.permutation import MAX_SIZE, derive_keys, permute

SIZES = [1, 2, 3, 5, 6, 7, 10, 97, 1000, *(2**bits + off for bits in (2, 5, 8, 11) for off in (-1, 0, 1))]
PINNED_SMALL = [8, 0, 5, 3, 6, 9, 1, 7, 4, 2]
PINNED_LARGE = [7457881625, 181402018786, 24232516182]


def keys(*counters):
    return derive_keys(0xC0FFEE, np.array(counters))


@pytest.mark.parametrize("size", [*SIZES, 10**6])
def test_it_is_one_to_one(size):
    for key in keys(0, 1):
        sent = permute(np.arange(size), size, key)
        np.testing.assert_array_equal(np.sort(sent), np.arange(size))


def test_an_index_goes_where_it_goes_among_all():
    """Random access: no answer depends on what else is asked, or in which form."""
    everything = permute(np.arange(1000), 1000, keys(7))
    some = np.array([[999, 0], [3, 3]])
    np.testing.assert_array_equal(permute(some, 1000, keys(7)), everything[some])
    mixed = permute(np.array([5, 5, 9]), 1000, keys(7, 8, 7))
    assert mixed.tolist() == [everything[5], permute(np.array([5]), 1000, keys(8))[0], everything[9]]


def test_it_is_pinned():
    """A resumed run continues the order that an older version of the code began."""
    assert permute(np.arange(10), 10, keys(0)).tolist() == PINNED_SMALL
    assert permute(np.array([0, 1, 10**12 - 1]), 10**12, keys(0)).tolist() == PINNED_LARGE


def test_a_huge_range_costs_what_is_asked_for():
    permute(np.arange(2), 3, keys(0))
    tracemalloc.start()
    sent = permute(np.arange(1000), MAX_SIZE, keys(1))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(sent)) == 1000 and sent.max() > MAX_SIZE // 2
    assert peak_bytes < 512 * 1024


@pytest.mark.parametrize(("size", "index"), [(0, 0), (MAX_SIZE + 1, 0), (5, 5), (5, -1)])
def test_what_lies_outside_is_refused(size, index):
    with pytest.raises(ValueError, match="size=|outside"):
        permute(np.array([index]), size, keys(0))


@pytest.mark.parametrize("size", [10_000, 65_536])
def test_places_are_uniform(size):
    """Chi-square of (64 origins x 64 destinations) under many keys; fixed seeds, 4.5 standard deviations allowed."""
    counts = np.zeros((64, 64))
    for key in keys(*range(20)):
        sent = permute(np.arange(size), size, key)
        np.add.at(counts, (np.arange(size) * 64 // size, sent * 64 // size), 1)
    expected = 20 * size / 64**2
    freedom = 63**2
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_neighbours_part_and_keys_differ():
    size = 100_000
    indexes = np.arange(size)
    first, second = (permute(indexes, size, key) for key in keys(1, 2))
    # Of uniform values: displacement n/3, distance of neighbours n/3, one fixed point, correlation 0.
    assert abs(np.abs(first - indexes).mean() / size - 1 / 3) < 0.005
    assert abs(np.abs(np.diff(first)).mean() / size - 1 / 3) < 0.005
    assert (first == indexes).sum() < 8 and (first == second).sum() < 8
    for other in (indexes, second, np.roll(first, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.015


def test_small_ranges_come_in_every_order():
    """All 24 orders of 4 rows, each about as often; 23 degrees of freedom, so 60 has a chance of 4e-5."""
    drawn = Counter(tuple(permute(np.arange(4), 4, key).tolist()) for key in keys(*range(4800)))
    assert set(drawn) == set(itertools.permutations(range(4)))
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 60
