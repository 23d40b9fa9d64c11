"""The sequence of samples that ranks are given, with real decode actors, whoever reads and whatever dies."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from pipelines.data import schema
from pipelines.data.order.global_batches import PADDING, Order
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import PartRows, TableRows
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
    return Corpus([MixtureSource("a", TableRows(table), 34.0), MixtureSource("b", PartRows(str(parts)), 18.0)])


@pytest.fixture(scope="module")
def order(corpus):
    return Order(corpus.streams("explicit"), SEED, GLOBAL_BATCH)


def expected(corpus, order, num_steps):
    """Ids of every step, from the pure function alone."""
    rows_SG = order.at(np.arange(num_steps)).rows_SG
    names = corpus.take(np.arange(corpus.num_rows))[schema.SAMPLE_ID].to_pylist()
    return [[names[row] for row in rows if row != PADDING] for rows in rows_SG]


def start_feed(ray, corpus, order, num_steps, decode_workers, **options):
    from pipelines.training.group.feed import BatchFeed

    actor = ray.remote(BatchFeed).options(num_cpus=0)
    return actor.remote(order, [ray.put(corpus)], total_steps=num_steps, decode_workers=decode_workers, **options)


def open_rank(feed, start_step, num_steps, rank, world_size, attempt="first"):
    from pipelines.training.group.feed import rank_batches

    options = {"attempt": attempt, "rank": rank, "world_size": world_size, "source": DECODE}
    return rank_batches(feed, start_step=start_step, total_steps=num_steps, **options)


def read_rank(feed, path, *arguments):
    """Write down each step's ids as they come."""
    batches, rank = open_rank(feed, *arguments), arguments[2]
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


def read_by_threads(feed, folder, start_step, num_steps, world_size, attempt="first"):
    folder.mkdir()
    arguments = [
        (feed, folder / f"rank-{rank}", start_step, num_steps, rank, world_size, attempt) for rank in range(world_size)
    ]
    threads = [threading.Thread(target=read_rank, args=values) for values in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return written(folder, start_step, num_steps)


@pytest.mark.parametrize(
    ("world_size", "decode_workers", "num_steps", "segment_steps"),
    # The second goes from one segment into the next, the third does so time and again.
    [
        pytest.param(1, 1, 40, 512, marks=pytest.mark.slow),
        (2, 3, 530, 512),
        pytest.param(3, 2, 40, 9, marks=pytest.mark.slow),
        pytest.param(8, 1, 40, 512, marks=pytest.mark.slow),
    ],
)
def test_the_sequence_is_the_same_for_any_number_of_readers(
    world_size, decode_workers, num_steps, segment_steps, corpus, order, ray_local, tmp_path
):
    feed = start_feed(ray_local, corpus, order, num_steps, decode_workers, segment_steps=segment_steps)
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


@pytest.fixture
def built(monkeypatch):
    """What a feed builds and ends, without Ray: segments of at most two steps."""
    told = []

    def build(order, rows, *, first_step, end_step, world_size, **others):
        told.append(("build", first_step, end_step))
        return [(len(told), rank) for rank in range(world_size)]

    monkeypatch.setattr("pipelines.training.group.feed.build_segment", build)
    monkeypatch.setattr("pipelines.training.group.feed.close_segment", lambda streams: told.append(("close", *streams)))
    return told


def test_an_attempt_shares_its_segments_and_the_next_attempt_gets_its_own(order, built):
    from pipelines.training.group.feed import BatchFeed

    feed = BatchFeed(order, [None], total_steps=100, decode_workers=1, segment_steps=2)
    streams = feed.segment("a", 4, 2, DECODE)
    assert feed.segment("a", 4, 2, DECODE) is streams and built == [("build", 4, 6)]
    # The same step and as many ranks: nothing of the part-consumed segment may come back.
    again = feed.segment("b", 4, 2, DECODE)
    assert again != streams and built[1:] == [("close", *streams), ("build", 4, 6)]
    with pytest.raises(RuntimeError, match="attempt a asks for step 6, but b has begun"):
        feed.segment("a", 6, 2, DECODE)
    following = [feed.segment("b", step, 2, DECODE) for step in (6, 8, 10)]
    assert [feed.segment("b", step, 2, DECODE) for step in (8, 10)] == following[1:]
    assert len(built) == 6 and len(feed._segments) == 2, "the oldest are let go, and not closed: they may still be read"


@pytest.mark.parametrize("taken", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_second_attempt_gets_all_batches_after_the_first_died(taken, corpus, order, ray_local, tmp_path):
    """The first died between its ranks' arrivals at Ray's barrier, or in the middle of a segment."""
    feed = start_feed(ray_local, corpus, order, 20, 1)
    if taken:
        ranks = [open_rank(feed, 0, 20, rank, 2, "dead") for rank in range(2)]
        firsts = [threading.Thread(target=next, args=(batches,)) for batches in ranks]
        for first in firsts:
            first.start()
        for first in firsts:
            first.join()
        for _ in range(taken - 1):
            next(ranks[0])
    else:

        def arrive_alone():
            with contextlib.suppress(ray_local.exceptions.ActorDiedError):  # what the dead would not see
                next(open_rank(feed, 0, 20, 1, 2, "dead"))

        threading.Thread(target=arrive_alone, daemon=True).start()
        time.sleep(3.0)
    assert read_by_threads(feed, tmp_path / "read", 0, 20, 2, "second") == expected(corpus, order, 20)
    ray_local.kill(feed)


class OneRankFeed:
    """Stands for the feed of one rank: hands out lists of batches, and notes when each was asked for."""

    def __init__(self, ray, steps_of_segments, batch):
        self.segments = {steps[0]: [batch(step) for step in steps] for steps in steps_of_segments}
        self.asked, self.segment, self._ray, self.num_steps = [], self, ray, None

    def remote(self, attempt, step, world_size, source):
        self.asked.append(step)
        return self._ray.put([Stream(self.segments[step], step, self.num_steps or len(self.segments[step]))])


@dataclasses.dataclass
class Stream:
    batches: list
    first_step: int
    num_steps: int

    def __iter__(self):
        return iter(self.batches)


@pytest.fixture
def batch():
    from pipelines.data.batches.batch import SampleBatch

    def build(step, rank=0):
        one = np.ones(1, bool)
        return SampleBatch(step, rank, ["s"], [""], np.zeros(1), one, np.zeros((1, 1)), [], one[None])

    return build


def test_the_next_segment_is_under_way_before_this_one_ends(ray_local, batch):
    feed = OneRankFeed(ray_local, [range(100), range(100, 130), range(130, 160)], batch)
    seen = []
    for one in open_rank(feed, 0, 160, 0, 1):
        seen.append(one.step)
        deadline = time.monotonic() + 10
        # From 64 steps before the end, and all the time beside a short segment; but never two segments ahead.
        most = [0, 100] if one.step < 100 else [0, 100, 130]
        wanted = [0] if one.step < 36 else most
        while len(feed.asked) < len(wanted) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert feed.asked in (wanted, most), one.step
    assert seen == list(range(160))


def test_a_slow_start_is_begun_sooner():
    from pipelines.training.group.feed import _SegmentReader

    reader = _SegmentReader(lambda step: Stream([], 0, 0), 0, 0)
    reader.end_step, reader.start_s = 512, 5.0
    assert not reader.is_near_end(0, 0.0)
    assert not reader.is_near_end(200, 20.0)  # 31 s are left
    assert reader.is_near_end(200, 6.0)  # 9 s


@pytest.mark.parametrize(
    ("step", "rank", "message"),
    [(1, 1, r"rank 0 at step 1 was given \(1, 1\)"), (2, 0, r"rank 0 at step 1 was given \(2, 0\)")],
)
def test_a_wrong_batch_stops_the_rank(step, rank, message, ray_local, batch):
    feed = OneRankFeed(ray_local, [range(3)], batch)
    feed.segments[0][1] = batch(step, rank)
    batches = open_rank(feed, 0, 3, 0, 1)
    assert next(batches).step == 0
    with pytest.raises(RuntimeError, match=message):
        next(batches)


def test_a_segment_that_lost_a_batch_stops_the_rank(ray_local, batch):
    feed = OneRankFeed(ray_local, [range(3)], batch)
    feed.num_steps = 4
    with pytest.raises(RuntimeError, match="ended before step 3, not 4"):
        list(open_rank(feed, 0, 4, 0, 1))
