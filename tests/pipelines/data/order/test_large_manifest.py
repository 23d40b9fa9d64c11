"""One batch of a manifest that is far larger than memory, found by a process that knows nothing yet."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import schema
from pipelines.data.order.global_batches import Order, rank_columns
from pipelines.data.order.mixture import open_corpus
from tests.pipelines.data.manifest_parts import row_contents, write_parts

REPOSITORY = Path(__file__).resolve().parents[4]
RANK, WORLD_SIZE, GLOBAL_BATCH, SEED = 17, 64, 2048, 11
_LOOK_UP = """
import json, pathlib, sys, time
begun_s = time.clock_gettime(time.CLOCK_MONOTONIC)
import numpy as np
from pipelines.data.batches.batch import RANK
from pipelines.data.order.mixture import open_corpus
from pipelines.data.order.global_batches import Order
from pipelines.data.batches.plan import RowLookup, training_blocks
imported_s = time.clock_gettime(time.CLOCK_MONOTONIC)
path, seed, global_batch, step, rank, world_size, started_s = json.loads(sys.argv[1])
corpus = open_corpus([(path, None)], split="train", kind=None)
order = Order(corpus.streams("proportional"), seed, global_batch)
plan = training_blocks(order.at(np.array([step])), first_step=step, world_size=world_size, steps_per_block=1)[rank]
rows = RowLookup(corpus, seed=seed, is_random=False)(plan)
ended_s = time.clock_gettime(time.CLOCK_MONOTONIC)
status = pathlib.Path("/proc/self/status").read_text().splitlines()
print(json.dumps({
    "rows": rows.select(["sample_id", "media", "caption", "kind", "step", "rank"]).to_pylist(),
    "start_s": begun_s - started_s, "import_s": imported_s - begun_s, "look_up_s": ended_s - imported_s,
    "total_s": ended_s - started_s,
    "peak_mb": next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024,
    "bytes_read": corpus.sources[0].rows.bytes_read,
}))
"""


def _look_up(path: Path, step: int) -> dict:
    import time

    arguments = [str(path), SEED, GLOBAL_BATCH, step, RANK, WORLD_SIZE, time.clock_gettime(time.CLOCK_MONOTONIC)]
    done = subprocess.run(
        [sys.executable, "-c", _LOOK_UP, json.dumps(arguments)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout)
    return found


def _check(path: Path, step: int, found: dict, num_videos: int) -> None:
    """Against what the generator says of the row numbers that the order names here."""
    order = Order(open_corpus([(str(path), None)], split="train", kind=None).streams("proportional"), SEED, 2048)
    batch = order.at(np.array([step]))
    numbers = batch.rows_SG[0, rank_columns(GLOBAL_BATCH, WORLD_SIZE)[RANK]]
    num_images = order.rows_per_epoch - num_videos
    assert len(found["rows"]) == len(set(numbers.tolist())) == GLOBAL_BATCH // WORLD_SIZE
    for number, row in zip(numbers.tolist(), found["rows"], strict=True):
        # Files number the videos first, the order the images.
        contents = row_contents(number + num_videos if number < num_images else number - num_images)
        assert row[schema.SAMPLE_ID] == contents[schema.SAMPLE_ID]
        assert row[schema.MEDIA] == contents[schema.MEDIA]
        assert row[schema.CAPTION] == contents[schema.CAPTIONS][0]
        assert (row["step"], row["rank"], row[schema.KIND]) == (step, RANK, batch.kinds[0])


def _made(folder: Path, num_images: int, num_videos: int, rows_per_part: int) -> Path:
    counts = {("video", "train"): num_videos, ("image", "train"): num_images, ("image", "val"): 1000}
    write_parts(folder / "manifest", counts, rows_per_part=rows_per_part)
    return folder


def _forget(files: list[Path]) -> None:
    """Drop the files from the operating system's cache."""
    os.sync()
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_rank_finds_its_batch_in_a_fresh_process(tmp_path):
    path = _made(tmp_path, 260_000, 40_000, 16_384)
    found = _look_up(path, 123_456)
    _check(path, 123_456, found, 40_000)
    everything = sum(file.stat().st_size for file in (path / "manifest").iterdir())
    assert found["bytes_read"] < everything


@pytest.mark.slow
def test_a_rank_finds_its_batch_among_100_million_rows(tmp_path):
    num_images, num_videos = 90_000_000, 10_000_000
    if shutil.disk_usage(tmp_path).free < 12 * 2**30:
        pytest.skip(f"100 million rows need 4 GB, and {tmp_path} has less than 12 GiB free")
    path = _made(tmp_path, num_images, num_videos, 131_072)
    files = list((path / "manifest").iterdir())
    size_gb = sum(file.stat().st_size for file in files) / 1e9
    try:
        for step in (123_456, 123_457):
            _forget(files)
            found = _look_up(path, step)
            _check(path, step, found, num_videos)
            print(
                f"\n{num_images + num_videos} rows in {len(files)} files of {size_gb:.2f} GB: rank {RANK} of "
                f"{WORLD_SIZE}, step {step}, {len(found['rows'])} rows; from process start {found['total_s']:.2f} s "
                f"(start {found['start_s']:.2f}, imports {found['import_s']:.2f}, look-up {found['look_up_s']:.2f}), "
                f"peak {found['peak_mb']:.0f} MB, {found['bytes_read'] / 1e6:.2f} MB read"
            )
            assert found["total_s"] < 3 and found["peak_mb"] < 500
    finally:
        shutil.rmtree(path)
