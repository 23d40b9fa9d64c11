"""One run in many ways: killed and resumed, with other numbers of workers. The trajectory stays the same."""

import json
import random

import pytest
from safetensors.torch import load_file

from jobs.demo.world.corpus import write_world
from jobs.settings.model import OptimSettings
from pipelines.data.storage import checkpoint_folders
from pipelines.training.records.metrics_log import read_metrics
from tests.jobs.train.test_job import TINY, settings
from tests.jobs.train_jobs import Job

pytestmark = pytest.mark.slow

STEPS = 40
SAME_WORLD, OTHER_WORLD = {"losses": 1e-6, "weights": 1e-5}, {"losses": 1e-4, "weights": 1e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_images=100, num_clips=50, num_test_images=2, num_test_clips=2, seed=3)
    return folder


def chosen(world, output, **changes):
    """Batches of 31, which no number of workers divides; dropout 0."""
    plain = settings(world, output)
    model = plain.model.model_copy(update={"qformer": TINY.model_copy(update={"dropout": 0.0})})
    values = {
        "model": model,
        "steps": STEPS,
        "batch_size": 31,
        "checkpoint_every": 4,
        "log_every": 1,
        "optim": OptimSettings(learning_rate=3e-4, warmup_steps=2),
    }
    return settings(world, output, **{**values, **changes})


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Job(chosen(world, folder / "run"), folder / "log") as job:
        assert job.end() == 0, job.log.read_text()[-3000:]
    return folder / "run"


def assert_same_trajectory(output, expected, allowed):
    found, reference = (read_metrics(str(run)) for run in (output, expected))
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for record, other in zip(found, reference, strict=True):
        assert record["batch_ids"] == other["batch_ids"], record["step"]
        for name in ("itc", "itm", "itg", "total"):
            gap = abs(record[f"loss/{name}"] - other[f"loss/{name}"])
            assert gap <= allowed["losses"], (name, record["step"], gap)
    weights, others = (
        load_file(f"{checkpoint_folders.newest_checkpoint(str(run))}/bridge.safetensors") for run in (output, expected)
    )
    worst = max(float((weights[name] - tensor).abs().max()) for name, tensor in others.items())
    print(f"largest gap of a weight {worst:.2e}")
    assert weights.keys() == others.keys() and worst <= allowed["weights"], worst
    summary = json.loads((output / "summary.json").read_text())
    expected_summary = json.loads((expected / "summary.json").read_text())
    for name in ("rows_in", "rows_used", "rows_quarantined"):
        assert summary[name] == expected_summary[name]


def random_step(*between):
    step = random.SystemRandom().randint(*between)  # the seeded one is the same in every test
    print(f"kill after step {step}")
    return step


@pytest.mark.parametrize("victim", ["RayTrainWorker", "TrainController", "job"])
def test_killed_and_resumed(victim, world, uninterrupted, tmp_path):
    run = chosen(world, tmp_path / "run", max_failures=1)
    with Job(run, tmp_path / "log") as job:
        job.wait_for_step(random_step(6, 30))
        if victim == "job":
            job.kill()
        else:
            job.kill_one(victim)
        status = job.process.wait(300)
    if victim == "RayTrainWorker":
        assert status == 0, job.log.read_text()[-3000:]
    if victim == "TrainController":
        assert status != 0 and "run the same command with --resume" in job.log.read_text()
    if status != 0:
        with Job(run, tmp_path / "log2", resume=True) as job:
            assert job.end() == 0, job.log.read_text()[-3000:]
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) >= 2 and starts[-1]["step"] > 0
    assert_same_trajectory(tmp_path / "run", uninterrupted, SAME_WORLD)


def test_with_two_then_one_then_three_workers(world, uninterrupted, tmp_path):
    for workers, until in ((2, random_step(6, 14)), (1, random_step(18, 26)), (3, None)):
        run = chosen(world, tmp_path / "run", workers=workers)
        with Job(run, tmp_path / f"log{workers}", resume=workers != 2) as job:
            if until is None:
                assert job.end() == 0, job.log.read_text()[-3000:]
            else:
                job.wait_for_step(until)
                job.kill()
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["workers"] for start in starts] == [2, 1, 3]
    assert_same_trajectory(tmp_path / "run", uninterrupted, OTHER_WORLD)


def test_gradient_caching_changes_nothing(world, uninterrupted, tmp_path):
    run = chosen(world, tmp_path / "run", micro_batch=5)
    with Job(run, tmp_path / "log") as job:
        assert job.end() == 0, job.log.read_text()[-3000:]
    assert_same_trajectory(tmp_path / "run", uninterrupted, OTHER_WORLD)


def test_losses_are_not_the_same_by_accident(uninterrupted):
    records = read_metrics(str(uninterrupted))
    assert abs(records[0]["loss/total"] - records[-1]["loss/total"]) > 0.1
    assert len({record["batch_ids"] for record in records}) == STEPS


@pytest.mark.parametrize("max_failures", [0, 1])
def test_the_coordinator_is_killed(max_failures, world, tmp_path):
    """What was handed out is trained on; then the run ends with what to do."""
    run = chosen(world, tmp_path / "run", max_failures=max_failures, steps=100_000, checkpoint_every=100)
    with Job(run, tmp_path / "log") as job:
        job.wait_for_step(3)
        job.kill_one("RunCoordinator")
        status = job.process.wait(300)
    log = job.log.read_text()
    assert status != 0 and "run the same command with --resume" in log and "Traceback" not in log
