"""When a run stops because its data is going bad."""

import numpy as np
import pytest

from pipelines.data.batch import Failure, SampleBatch
from pipelines.training.accounting import Accounting, TooManyQuarantinedError


def seen(rows, failed):
    accounting = Accounting()
    names = [f"s{index}" for index in range(rows)]
    failures = [Failure(name, None, "read", "missing", "gone") for name in names[:failed]]
    is_valid = np.arange(rows) >= failed
    batch = SampleBatch(
        0,
        0,
        names,
        [""] * rows,
        np.arange(rows),
        is_valid,
        np.zeros((rows, 1)),
        failures,
        np.ones((rows, 1), dtype=np.bool_),
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
