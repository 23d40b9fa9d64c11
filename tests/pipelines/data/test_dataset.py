"""The few tests that need Ray itself."""

import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data import schema
from pipelines.data.batches.batch import RANK, STEP, ImageRows, SampleBatch, pack
from pipelines.data.batches.plan import evaluation_blocks
from pipelines.data.dataset import RankStream, build_segment, evaluation_datasets, segment_blocks, to_batch
from pipelines.data.media.samples import SampleDecoder
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.order.global_batches import PADDING, Order, rank_columns
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import TableRows
from tests.pipelines.data.builders import DECODE, image_manifest, manifest

pytestmark = pytest.mark.usefixtures("ray_local")


def _consume(streams, pauses_s) -> list[list[SampleBatch]]:
    """Iterate all ranks at a time, each at its own speed, as workers that got their stream by pickle."""
    got: list[list[SampleBatch]] = [[] for _ in streams]

    def run(rank):
        for batch in pickle.loads(pickle.dumps(streams[rank])):
            got[rank].append(batch)
            time.sleep(pauses_s[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_every_rank_gets_its_rows_in_order(tmp_path, ray_local):
    table = image_manifest(tmp_path, 45)
    (tmp_path / "7.jpg").unlink()
    (tmp_path / "9.jpg").write_bytes(b"no picture")
    corpus = Corpus([MixtureSource("", TableRows(table))])
    order = Order(corpus.streams("proportional"), 1, 4)
    streams = build_segment(
        order,
        ray_local.put(corpus),
        first_step=96,
        end_step=108,
        world_size=2,
        source=DECODE,
        decode_workers=2,
    )
    got = _consume(streams, pauses_s=[0.0, 0.02])

    names = table[schema.SAMPLE_ID].to_pylist()
    for rank, batches in enumerate(got):
        assert [(batch.step, batch.rank) for batch in batches] == [(96 + s, rank) for s in range(12)]
        expected = order.at(np.arange(96, 108)).rows_SG[:, rank_columns(4, 2)[rank]]
        assert [batch.sample_ids for batch in batches] == [
            ["" if row == PADDING else names[row] for row in rows] for rows in expected
        ]
    everything = [batch for batches in got for batch in batches]
    failures = {failure.sample_id: failure.error_class for batch in everything for failure in batch.failures}
    assert failures == {"s7": "missing", "s9": "unsupported"}
    valid = [n for b in everything for n, ok in zip(b.sample_ids, b.is_valid, strict=True) if ok]
    assert sorted(valid) == sorted(set(names) - set(failures))
    red = {n: b.images[i, 0, 0].mean() for b in everything for i, n in enumerate(b.sample_ids) if b.is_valid[i]}
    assert all(abs(level - int(name[1:]) * 7 % 256) < 6 for name, level in red.items())


def test_evaluation_sees_every_row_once(tmp_path):
    table = image_manifest(tmp_path, 11)
    (dataset,) = evaluation_datasets(TableRows(table), batch_size=4, decode=DECODE, decode_workers=1)
    batches = [to_batch(block) for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow")]
    assert [len(batch.sample_ids) for batch in batches] == [4, 4, 3]
    assert [name for batch in batches for name in batch.sample_ids] == table[schema.SAMPLE_ID].to_pylist()
    assert all(batch.is_valid.all() for batch in batches)


def test_training_evaluation_and_serving_see_the_same_pixels(tmp_path, ray_local):
    """The preprocessing contract: one decoder, one geometry, whoever asks."""
    table = image_manifest(tmp_path, 4)
    corpus = Corpus([MixtureSource("", TableRows(table))])
    (stream,) = build_segment(
        Order(corpus.streams("proportional"), 0, 4),
        ray_local.put(corpus),
        first_step=0,
        end_step=1,
        world_size=1,
        source=DECODE,
        decode_workers=1,
    )
    (trained,) = list(stream)
    (dataset,) = evaluation_datasets(TableRows(table), batch_size=4, decode=DECODE, decode_workers=1)
    (evaluated,) = [to_batch(block) for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow")]
    places = [trained.sample_ids.index(name) for name in evaluated.sample_ids]
    np.testing.assert_array_equal(trained.images[places], evaluated.images)
    decoder = SampleDecoder(DECODE)  # what the service and the caption job decode with
    for row, media in enumerate(table[schema.MEDIA].to_pylist()):
        by_path, by_bytes = (
            decoder.decode(kind="image", media=media).pixels,
            decoder.decode(kind="image", data=Path(media).read_bytes()).pixels,
        )
        np.testing.assert_array_equal(by_path, evaluated.images[row])
        np.testing.assert_array_equal(by_bytes, evaluated.images[row])
    decoder.close()


class Delivered:
    """Stands for Ray's iterator of one rank: a block of one row for each (step, rank)."""

    def __init__(self, places):
        (row,) = evaluation_blocks(TableRows(manifest([{"sample_id": "s", "media": "/s.jpg"}])), 1)
        block = pack(row, ImageRows([(1, 1)]), [None], [StageCosts()])
        types = {name: block.schema.field(name).type for name in (STEP, RANK)}
        self.blocks = []
        for values in places:
            for name, value in zip(types, values, strict=True):
                column = block.schema.get_field_index(name)
                block = block.set_column(column, name, pa.array([value], types[name]))
            self.blocks.append(block)

    def iter_batches(self, **_):
        return iter(self.blocks)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(5, 1), (6, 1), (7, 1)], None),
        ([(5, 1), (6, 0), (7, 1)], "rank 1 expected step 6, got step 6 of rank 0"),
        ([(5, 1), (7, 1), (6, 1)], "rank 1 expected step 6, got step 7 of rank 1"),
        ([(5, 1), (5, 1)], "rank 1 expected step 6, got step 5"),
        ([(5, 1), (6, 1)], "rank 1 got 2 of 3 steps"),
    ],
)
def test_a_rank_refuses_what_is_not_its_own(places, message):
    stream = RankStream(Delivered(places), rank=1, first_step=5, num_steps=3)
    if message is None:
        assert [batch.step for batch in stream] == [5, 6, 7]
        return
    with pytest.raises(RuntimeError, match=message):
        list(stream)


def test_segments_of_many_ranks_are_long_enough_to_start_the_next():
    assert [segment_blocks(ranks) for ranks in (1, 8, 32, 64, 256, 512, 10**6)] == [2048, 256, 64, 64, 64, 32, 1]
