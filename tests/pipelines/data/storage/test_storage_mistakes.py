"""A mistake in settings met by a decode actor stops the run; in the trainer, in an evaluation, in a probe."""

import contextlib

import pytest

from jobs.cluster.exceptions import find_user_error
from jobs.data.prepare_probe import probe
from pipelines.data.corpus.preparation import Preparation
from pipelines.data.dataset import build_segment, evaluation_datasets, map_blocks, to_batch
from pipelines.data.media.samples import Limits
from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import TableRows
from pipelines.evaluation.protocols.row_results import collect, result_table
from tests.pipelines.data.builders import DECODE, image_manifest, manifest


class _NoModel:
    def __call__(self, block):
        return result_table(to_batch(block), {})


def test_an_unknown_protocol_stops_the_run(tmp_path, ray_local):
    table = manifest([*image_manifest(tmp_path, 3).to_pylist(), {"sample_id": "bad", "media": "nosuch://b/a.jpg"}])

    corpus = Corpus([MixtureSource("", TableRows(table))])
    order = Order(corpus.streams("proportional"), 0, 4)

    def train():
        streams = build_segment(
            order,
            ray_local.put(corpus),
            first_step=0,
            end_step=1,
            world_size=1,
            source=DECODE,
            decode_workers=1,
        )
        list(streams[0])

    def evaluate():
        datasets = evaluation_datasets(TableRows(table), batch_size=4, decode=DECODE, decode_workers=1)
        collect(map_blocks(datasets, _NoModel, {}, workers=1, use_gpu=False), len(table))

    def check():
        with contextlib.closing(Preparation()) as found:
            for checked in probe([table], num_frames=2, limits=Limits(), decode_workers=1):
                found.add(*checked)

    for job in (train, evaluate, check):
        with pytest.raises(Exception, match="nosuch") as caught:
            job()
        mistake = find_user_error(caught.value)
        assert mistake is not None and "sample 'bad' cannot be read: nosuch://b/a.jpg: no such protocol" in str(mistake)
