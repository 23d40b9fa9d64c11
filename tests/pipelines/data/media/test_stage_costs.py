"""Seconds of each stage: measured where they pass, carried by the packed table, reported in words."""

import time

import pytest

from pipelines.data.batches.batch import split_steps, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import evaluation_blocks
from pipelines.data.batches.stage_report import WorkerPool, bottleneck, format_bytes, run_table, stage_table
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.order.row_index import TableRows
from tests.pipelines.data.builders import DECODE, image_manifest, manifest, write_clip


def test_a_stage_that_fails_has_taken_its_time_too():
    costs = StageCosts()
    with pytest.raises(ZeroDivisionError), costs.measure("decode"):
        time.sleep(0.01)
        raise ZeroDivisionError
    with costs.measure("decode"):
        time.sleep(0.01)
    assert 0.02 <= costs.decode_s < 1 and set(costs.seconds()) == {"decode"}


def test_every_steps_costs_are_its_rows_own(tmp_path):
    table = image_manifest(tmp_path, 6)
    (tmp_path / "1.jpg").unlink()
    (block,) = evaluation_blocks(TableRows(table), 6)
    steps = block.column_names.index("step")
    block = block.set_column(steps, "step", [[0, 0, 0, 1, 1, 1]])
    begun_s = time.perf_counter()
    packed = DecodeRows(DECODE)(block)
    elapsed_s = time.perf_counter() - begun_s
    first, second = (unpack(part).costs for part in split_steps(packed))
    sizes = {index: (tmp_path / f"{index}.jpg").stat().st_size for index in range(6) if index != 1}
    assert first.fetched_bytes == sizes[0] + sizes[2]
    assert second.fetched_bytes == sizes[3] + sizes[4] + sizes[5]
    for costs in (first, second):
        assert min(costs.fetch_s, costs.decode_s, costs.transform_s) > 0 == costs.encode_s
    assert sum(first.seconds().values()) + sum(second.seconds().values()) < elapsed_s


def test_a_clip_costs_decoding(tmp_path):
    path = write_clip(tmp_path / "c.mp4", [100] * 4)
    rows = TableRows(manifest([{"sample_id": "c", "media": str(path), "kind": "video"}]))
    (block,) = evaluation_blocks(rows, 1)
    decode = DecodeRows(DECODE)
    costs = unpack(decode(block)).costs
    decode.close()
    assert costs.decode_s > 0.01 and costs.fetched_bytes == path.stat().st_size


def _pool(name, workers, **seconds):
    return WorkerPool(name=f"{name} workers", setting=f"{name}_workers", workers=workers, seconds=seconds)


def test_the_bottleneck_is_the_busiest_pools_largest_stage():
    decode, train = _pool("decode", 2, fetch=1.0, decode=15.0, transform=3.0), _pool("training", 1, train=4.0)
    sentence = bottleneck([decode, train], wall_s=10)
    assert sentence.startswith(
        "bottleneck: decode, 79% of the work of the decode workers, which were busy 95% of the time"
    )
    assert "more decode_workers" in sentence
    assert bottleneck([_pool("decode", 2, decode=5.0), _pool("training", 1, train=9.0)], 10).startswith(
        "bottleneck: train, 100%"
    )
    assert "none of the stages; the busiest, decode workers, was busy 20%" in bottleneck(
        [_pool("decode", 1, a=2.0)], 10
    )
    assert "there was nothing to do" in bottleneck([_pool("decode", 1)], 10)


def test_the_table_of_a_run():
    stages = {
        "wall_s": 10.0, "wait_s": 1.0, "encode_s": 6.0, "rows": 500.0, "fetched_bytes": 3.0 * 2**20,
        "fetch_s": 0.5, "decode_s": 2.0, "transform_s": 0.25,
    }  # fmt: skip
    assert run_table(stages, workers=1, decode_workers=2).splitlines() == [
        "stage        seconds    ms/row  share of",
        "fetch            0.5      1.00  2% of 2 decode workers",
        "decode           2.0      4.00  10% of 2 decode workers",
        "transform        0.2      0.50  1% of 2 decode workers",
        "encode           6.0     12.00  60% of 1 training workers",
        "train            3.0      6.00  30% of 1 training workers",
        "500 rows, 3 MiB read, in 10.0 s: 50.0 rows/s",
        "bottleneck: encode, 67% of the work of the training workers, which were busy 90% of the time; "
        "more workers on more cores (or GPUs) would help",
    ]
    assert stage_table([], wall_s=0, rows=0, fetched_bytes=0)


@pytest.mark.parametrize(("num_bytes", "text"), [(5, "5 B"), (723_712, "707 KiB"), (2.5 * 2**40, "2.5 TiB")])
def test_sizes_for_people(num_bytes, text):
    assert format_bytes(num_bytes) == text
