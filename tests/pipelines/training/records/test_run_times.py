"""What a run's summary says of its waiting."""

import numpy as np
import pytest

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.failures import Failure
from pipelines.data.media.stage_costs import StageCosts
from pipelines.training.records.run_times import RunTimes


def _batch(step, queue_depth, num_failed):
    failures = [Failure(f"s{row}", None, "read", "missing", "gone") for row in range(num_failed)]
    return SampleBatch(
        step=step,
        rank=0,
        sample_ids=["s0", "s1", "s2", ""],
        captions=[""] * 4,
        image_ids=np.arange(4),
        is_valid=np.array([row >= num_failed for row in range(3)] + [False]),
        images=np.zeros((4, 1)),
        failures=failures,
        frame_valid=np.ones((4, 1), bool),
        costs=StageCosts(decode_s=0.5),
        queue_depth=queue_depth,
    )


def test_queue_depth_and_quarantine_rate_are_of_the_whole_run():
    times = RunTimes()
    assert times.combined(0.0)["quarantine_rate"] == 0
    for step, (depth, failed) in enumerate([(4, 0), (0, 2), (2, 1), (2, 0)]):
        times.add(_batch(step, depth, failed), wait_s=0.25)
    told = times.combined(encode_s=0.0)
    assert (told["wait_s"], told["rows"], told["decode_s"]) == (1.0, 12, 2.0)
    assert told["queue_depth"] == 2.0 and told["quarantine_rate"] == pytest.approx(3 / 12)
