"""When a run stops because its data is going bad."""

import time

import numpy as np
import pytest

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.failures import Failure
from pipelines.training.records.accounting import Accounting, TooManyQuarantinedError


def seen(rows, failed):
    accounting = Accounting()
    names = [f"s{index}" for index in range(rows)]
    failures = [Failure(name, None, "read", "missing", "gone") for name in names[:failed]]
    is_valid = np.arange(rows) >= failed
    batch = SampleBatch(
        step=0,
        rank=0,
        sample_ids=names,
        captions=[""] * rows,
        image_ids=np.arange(rows),
        is_valid=is_valid,
        images=np.zeros((rows, 1)),
        frame_valid=np.ones((rows, 1), dtype=bool),
        failures=failures,
    )
    accounting.add(batch, 0)
    accounting.combine()
    return accounting


@pytest.mark.parametrize(
    ("rows", "failed", "is_stopped"),
    [
        (100, 0, False),
        (100, 12, False),  # 5 expected, and chance may bring a few more
        (100, 16, True),
        (10_000, 550, False),
        (10_000, 600, True),
        (2, 2, True),  # nothing used at all
    ],
)
def test_the_rows_so_far_tell(rows, failed, is_stopped):
    accounting = seen(rows, failed)
    if not is_stopped:
        accounting.check(epoch=0, rows_per_epoch=10**6, max_share=0.05)
        return
    with pytest.raises(TooManyQuarantinedError, match=f"rows quarantined {failed}; see|{failed} of 1000000"):
        accounting.check(epoch=0, rows_per_epoch=10**6, max_share=0.05)


def test_the_epoch_is_stopped_as_soon_as_its_share_is_used_up():
    with pytest.raises(TooManyQuarantinedError, match="6 of 100 rows of epoch 0"):
        seen(90, 6).check(epoch=0, rows_per_epoch=100, max_share=0.05)
    seen(90, 5).check(epoch=0, rows_per_epoch=100, max_share=0.05)


def test_the_quarantine_table_names_epoch_and_reason():
    rows = seen(3, 2).table().to_pylist()
    assert [(row["sample_id"], row["error_class"], row["epoch"]) for row in rows] == [
        ("s0", "missing", 0),
        ("s1", "missing", 0),
    ]


def test_only_the_first_rank_holds_the_rows_and_all_come_to_the_same_verdict(monkeypatch):
    states = []
    for rank in (0, 1):
        monkeypatch.setattr("pipelines.training.records.accounting.rank", lambda rank=rank: rank)
        accounting = seen(90, 6)
        with pytest.raises(TooManyQuarantinedError, match=r"6 of 100 rows of epoch 0 are quarantined \(missing;"):
            accounting.check(epoch=0, rows_per_epoch=100, max_share=0.05)
        states.append(accounting.state())
        assert len(accounting.quarantined) == len(accounting.table()) == (6 if rank == 0 else 0)
        # A resumed run, of which every rank reads the first one's state.
        resumed = Accounting.from_state(states[0])
        assert len(resumed.quarantined) == (6 if rank == 0 else 0)
        with pytest.raises(TooManyQuarantinedError, match=r"6 of 100 rows of epoch 0 are quarantined \(missing;"):
            resumed.check(epoch=0, rows_per_epoch=100, max_share=0.05)
    assert states[0]["rows_quarantined"] == states[1]["rows_quarantined"] == 6


def test_a_large_table_is_built_at_once():
    accounting = seen(3, 1)
    (values,) = accounting.quarantined.values()
    accounting.quarantined |= {f"1/{n}": {**values, "epoch": 1, "sample_id": str(n)} for n in range(100_000)}
    begun_s = time.monotonic()
    table = accounting.table()
    assert len(table) == 100_001 and table["epoch"].to_pylist()[:2] == [0, 1]
    assert time.monotonic() - begun_s < 10.0, "a table a row took minutes"
    assert table["sample_id"].num_chunks == 1
