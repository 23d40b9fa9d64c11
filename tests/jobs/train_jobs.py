"""Training jobs in processes of their own, and what to kill of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from pipelines.training.records.metrics_log import read_metrics

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300


def descendants(root_pid, name):
    """Processes below one whose command line holds a name."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                pid = int(folder.name)
                parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[pid] = (folder / "cmdline").read_text()
    tree = {root_pid}
    while grown := {pid for pid, parent in parents.items() if parent in tree and pid not in tree}:
        tree |= grown
    return sorted(pid for pid in tree if name in names.get(pid, ""))


class Job:
    """`python -m jobs.train` with these settings, ended with all its processes when the block ends.

    Args:
        settings: `TrainSettings`.
        log: File for what it prints.
        resume: Go on.
    """

    def __init__(self, settings, log, *, resume=False, environment=None):
        config = Path(log).with_suffix(".yaml")
        config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        command = [sys.executable, "-m", "jobs.train", "--config", str(config), *(["--resume"] if resume else [])]
        self.output, self.log = settings.output, Path(log)
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                start_new_session=True,
                stdout=file,
                stderr=file,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()

    def wait_for_step(self, step):
        """Until the log holds a step, or the job is done with it."""
        end = time.monotonic() + PATIENCE_S
        while not any(record["step"] >= step for record in read_metrics(self.output)):
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def kill(self):
        """The whole job, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_one(self, name):
        """One process of the job, by a part of its command line."""
        found = descendants(self.process.pid, name)
        assert found, f"no process {name}"
        os.kill(found[0], signal.SIGKILL)

    def end(self):
        """Exit status, when it has ended by itself."""
        return self.process.wait(PATIENCE_S)
