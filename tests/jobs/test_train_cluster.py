"""A real cluster of three nodes on this machine: one is killed in mid-epoch, and comes back."""

import json
import time

import pytest

from cluster.local import LocalCluster
from jobs.cluster_session import set_ray_environment
from jobs.settings_data import RaySettings
from pipelines.training.telemetry import read_metrics
from tests.jobs.test_train_trajectory import OTHER_WORLD, STEPS, assert_same_trajectory, chosen, uninterrupted, world  # noqa: F401
from tests.jobs.train_jobs import Job

pytestmark = pytest.mark.slow


def starts(run):
    file = run / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_killed_node_shrinks_the_group_and_the_run_ends_by_itself(world, uninterrupted, tmp_path):  # noqa: F811
    """Each node has room for one worker and one decoder: with one node less, two workers go on."""
    set_ray_environment()
    with LocalCluster(3, cpus_per_node=2) as cluster:
        run = chosen(
            world,
            tmp_path / "run",
            workers=3,
            min_workers=1,
            tokenizer=uninterrupted / "tokenizer",
            ray=RaySettings(address=cluster.address),
        )
        with Job(run, tmp_path / "log") as job:
            job.wait_for_step(7)
            cluster.kill_node()
            begun_s = time.monotonic()
            status = job.process.wait(500)
        log = (tmp_path / "log").read_text()
        assert status == 0, log[-4000:]
    found = starts(tmp_path / "run")
    groups = [start["workers"] for start in found]
    print(f"ended {time.monotonic() - begun_s:.0f} s after the kill; workers at each start {groups}")
    assert found[0]["workers"] == 3 and found[-1]["workers"] < 3 and found[-1]["step"] > 0
    assert len(read_metrics(str(tmp_path / "run"))) == STEPS
    assert f"resuming at step {found[-1]['step']} with {found[-1]['workers']} worker" in log  # it says what happened
    assert_same_trajectory(tmp_path / "run", uninterrupted, OTHER_WORLD)
