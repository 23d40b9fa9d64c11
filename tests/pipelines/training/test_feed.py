"""The sequence of samples that ranks are given, with real decode actors, whoever reads and whatever dies."""

import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from pipelines.data import schema
from pipelines.data.mixture import Corpus, Source
from pipelines.data.order import PADDING, Order
from pipelines.data.row_index import PartRows, TableRows
from tests.pipelines.data.builders import DECODE, image_manifest, write_clip
from tests.pipelines.data.manifest_parts import cut_into_parts

SEED, GLOBAL_BATCH = 4, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 images and 3 clips, and in parts 9 images more that are drawn twice as often."""
    folders = [tmp_path_factory.mktemp("source") for _ in range(2)]
    first, second = image_manifest(folders[0], 43).to_pylist(), image_manifest(folders[1], 9)
    for row in first[40:]:
        clip = write_clip(folders[0] / f"{row[schema.SAMPLE_ID]}.mp4", [40, 90, 140, 190])
        row |= {schema.KIND: schema.VIDEO, schema.MEDIA: str(clip)}
    table = type(second).from_pylist(first, schema=schema.MANIFEST_SCHEMA)
    parts = cut_into_parts(folders[1] / "manifest", second, rows_per_part=4)
    return Corpus([Source("a", TableRows(table), 34.0), Source("b", PartRows(str(parts)), 18.0)])


@pytest.fixture(scope="module")
def order(corpus):
    return Order(corpus.streams("explicit"), SEED, GLOBAL_BATCH)


def expected(corpus, order, num_steps):
    """Ids of every step, from the pure function alone."""
    rows_SG = order.at(np.arange(num_steps)).rows_SG
    names = corpus.take(np.arange(corpus.num_rows))[schema.SAMPLE_ID].to_pylist()
    return [[names[row] for row in rows if row != PADDING] for rows in rows_SG]


def start_feed(ray, corpus, order, num_steps, decode_workers):
    from pipelines.training.feed import BatchFeed

    actor = ray.remote(BatchFeed).options(num_cpus=0)
    return actor.remote(order, [ray.put(corpus)], total_steps=num_steps, decode_workers=decode_workers)


def read_rank(feed, path, start_step, num_steps, rank, world_size):
    """Write down each step's ids as they come."""
    from pipelines.training.feed import rank_batches

    batches = rank_batches(
        feed, start_step=start_step, total_steps=num_steps, rank=rank, world_size=world_size, source=DECODE
    )
    with open(path, "a") as file:
        for batch in batches:
            assert not batch.failures and batch.is_valid.tolist() == [bool(name) for name in batch.sample_ids]
            file.write(json.dumps([batch.step, rank, [name for name in batch.sample_ids if name]]) + "\n")
            file.flush()


def written(folder, start_step, end_step):
    """Ids of each step over all ranks."""
    steps = {}
    for path in folder.glob("rank-*"):
        for line in path.read_text().splitlines():
            step, rank, names = json.loads(line)
            assert (step, rank) not in steps, "a rank was given a step twice"
            steps[step, rank] = names
    world_size = 1 + max(rank for _, rank in steps)
    return [[name for rank in range(world_size) for name in steps[step, rank]] for step in range(start_step, end_step)]


def read_by_threads(feed, folder, start_step, num_steps, world_size):
    folder.mkdir()
    arguments = [(feed, folder / f"rank-{rank}", start_step, num_steps, rank, world_size) for rank in range(world_size)]
    threads = [threading.Thread(target=read_rank, args=values) for values in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return written(folder, start_step, num_steps)


@pytest.mark.parametrize(
    ("world_size", "decode_workers", "num_steps"),
    [(1, 1, 40), (2, 3, 530), (3, 2, 40), (8, 1, 40)],  # the second crosses into another segment
)
def test_the_sequence_is_the_same_for_any_number_of_readers(
    world_size, decode_workers, num_steps, corpus, order, ray_local, tmp_path
):
    feed = start_feed(ray_local, corpus, order, num_steps, decode_workers)
    found = read_by_threads(feed, tmp_path / "read", 0, num_steps, world_size)
    assert found == expected(corpus, order, num_steps)
    ray_local.kill(feed)


def test_the_sequence_goes_on_after_a_kill_with_another_number_of_readers(corpus, order, ray_local, tmp_path):
    """Two reader processes and their feed are killed; three readers go on from the last step both had done."""
    num_steps, killed_at = 60, random.randrange(5, 25)
    feed = start_feed(ray_local, corpus, order, 4000, 1)
    (tmp_path / "before").mkdir()

    class Reader:
        def pid(self):
            return os.getpid()

        def read(self, *arguments):
            read_rank(*arguments)

    readers = [ray_local.remote(Reader).options(num_cpus=0).remote() for _ in range(2)]
    pids = ray_local.get([reader.pid.remote() for reader in readers])
    paths = [tmp_path / "before" / f"rank-{rank}" for rank in range(2)]
    for rank, reader in enumerate(readers):
        reader.read.remote(feed, paths[rank], 0, 4000, rank, 2)
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text().count("\n") > killed_at for path in paths):
        assert time.monotonic() < deadline, "the readers got nothing"
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ray_local.kill(feed)
    done = min(path.read_text().count("\n") for path in paths)
    done = min(done, num_steps - 10)
    done -= done % order.steps_per_epoch == 0  # the middle of an epoch is the harder case
    survived = written(tmp_path / "before", 0, done)

    feed = start_feed(ray_local, corpus, order, num_steps, 2)
    went_on = read_by_threads(feed, tmp_path / "after", done, num_steps, 3)
    assert survived + went_on == expected(corpus, order, num_steps)
    ray_local.kill(feed)
