"""Ray Train starts its workers again after one died between the ranks' arrivals at a segment."""

import json
import os
import resource
import signal
import time
import uuid
from pathlib import Path

import pytest

from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import TableRows
from tests.pipelines.data.builders import DECODE, image_manifest

STEPS = 12


def page_faults_of_tensors():
    """For ten times 40 MiB, of 10,240 small pages, after a first time that fetches them in any case."""
    faults = []
    for size in [40 * 2**20] * 11:
        assert len(b"x" * size) == size
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return faults[-1] - faults[0]


def read_and_die_once(arguments):
    """Rank 1 of the first attempt is killed when rank 0 waits for it."""
    from pipelines.training.group.feed import rank_batches
    from qformer.distributed import any_text, rank

    folder = Path(arguments["folder"])
    is_first = not (folder / "killed").exists()
    attempt = str(any_text(uuid.uuid4().hex))  # as `jobs.train.job` does
    if is_first and rank() == 1:
        while not (folder / "arriving").exists():
            time.sleep(0.1)
        time.sleep(5.0)
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "arriving").touch()
    options = {"start_step": 0, "total_steps": STEPS, "rank": rank(), "world_size": 2, "source": DECODE}
    assert page_faults_of_tensors() < 100
    found = [[batch.step, batch.sample_ids] for batch in rank_batches(arguments["feed"], attempt=attempt, **options)]
    (folder / f"rank-{rank()}.json").write_text(json.dumps(found))
    return {}


@pytest.mark.slow
def test_the_second_attempt_gets_every_batch(ray_local, tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)  # what the user has set stays
    from pipelines.training.group.coordinator import RunCoordinator
    from pipelines.training.group.feed import BatchFeed
    from pipelines.training.group.launch import launch

    table = image_manifest(tmp_path, 24)
    corpus = Corpus([MixtureSource("", TableRows(table))])
    order = Order(corpus.streams("proportional"), 3, 4)
    actor = ray_local.remote(RunCoordinator).options(num_cpus=0)
    coordinator = actor.remote(BatchFeed(order, [ray_local.put(corpus)], total_steps=STEPS, decode_workers=1))
    options = {
        "use_gpu": False,
        "max_failures": 1,
        "min_workers": None,
        "hang_timeout_s": 100.0,
        "name": "restart",
        "scratch": str(tmp_path / "scratch"),
    }
    failures: list[str] = []
    launch(
        read_and_die_once,
        {"folder": str(tmp_path), "feed": coordinator},
        coordinator=coordinator,
        workers=2,
        total_steps=STEPS,
        save_failures=failures.extend,
        **options,
    )
    assert len(failures) and all(text.startswith("ALARM worker ") for text in failures)
    assert (tmp_path / "killed").exists()
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [[step for step, _ in steps] for steps in ranks] == [list(range(STEPS))] * 2
    names = [name for steps in ranks for _, of_step in steps for name in of_step]
    assert sorted(names) == sorted(2 * table["sample_id"].to_pylist())
    ray_local.kill(coordinator)
