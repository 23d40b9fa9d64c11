"""A real cluster of nodes on this machine: one is killed in mid-epoch and the run ends by itself; one comes."""

import contextlib
import json
import subprocess
import sys
import time

import pytest

from jobs.settings.data import RaySettings
from pipelines.training.records.metrics_log import read_metrics
from tests.jobs.train.test_trajectory import OTHER_WORLD, STEPS, assert_same_trajectory, chosen, uninterrupted, world  # noqa: F401
from tests.jobs.train_jobs import REPOSITORY, Job

pytestmark = pytest.mark.slow


class LocalCluster:
    """`python -m cluster.local` in a process of its own."""

    def __init__(self, nodes, cpus):
        command = [sys.executable, "-m", "cluster.local", "--nodes", str(nodes), "--cpus", str(cpus)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
        lines = [self._process.stdout.readline() for _ in range(3)]
        self.environment = dict(line.strip().removeprefix("export ").split("=") for line in lines)

    def tell(self, word):
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


def starts(run):
    file = run / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def elastic(world, output, cluster, **changes):  # noqa: F811
    """Three workers, or as many as there are nodes, each of which has room for one."""
    ray = RaySettings(address=cluster.environment["RAY_ADDRESS"])
    return chosen(world, output, workers=3, min_workers=1, ray=ray, **changes)


def test_a_killed_node_shrinks_the_group_and_the_run_ends_by_itself(world, uninterrupted, tmp_path):  # noqa: F811
    with contextlib.closing(LocalCluster(3, 1)) as cluster:
        run = elastic(world, tmp_path / "run", cluster)
        with Job(run, tmp_path / "log", environment=cluster.environment) as job:
            job.wait_for_step(7)
            assert cluster.tell("kill") == "2 nodes"
            begun_s = time.monotonic()
            status = job.process.wait(500)
        log = (tmp_path / "log").read_text()
        assert status == 0, log[-4000:]
    found = starts(tmp_path / "run")
    groups = [start["workers"] for start in found]
    print(f"ended {time.monotonic() - begun_s:.0f} s after the kill; workers at each start {groups}")
    assert groups[0] == 3 and groups[-1] == 2 and found[-1]["step"] > 0
    assert len(read_metrics(str(tmp_path / "run"))) == STEPS
    assert f"resuming at step {found[-1]['step']} with {groups[-1]} worker" in log  # it says what happened
    assert_same_trajectory(tmp_path / "run", uninterrupted, OTHER_WORLD)


def test_a_node_that_comes_grows_the_group(world, tmp_path):  # noqa: F811
    with contextlib.closing(LocalCluster(2, 1)) as cluster:
        # More steps than there is time for: the job is ended when it has grown.
        run = elastic(world, tmp_path / "run", cluster, steps=100_000, checkpoint_every=10)
        with Job(run, tmp_path / "log", environment=cluster.environment) as job:
            job.wait_for_step(3)
            assert cluster.tell("add") == "3 nodes"
            end = time.monotonic() + 240
            while len(starts(tmp_path / "run")) == 1:
                assert time.monotonic() < end and job.process.poll() is None, job.log.read_text()[-3000:]
                time.sleep(0.5)
            first, second, *_ = starts(tmp_path / "run")
            job.wait_for_step(second["step"] + 5)
            job.kill()
        assert (first["workers"], second["workers"]) == (2, 3) and second["step"] > 0
        assert f"resuming at step {second['step']} with 3 worker" in (tmp_path / "log").read_text()
    # What followed the last checkpoint was done again, in place of what had been logged.
    steps = [record["step"] for record in read_metrics(str(tmp_path / "run"))]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > second["step"]
