"""Joining or starting a Ray cluster."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import ray

from jobs.cluster.session import _start, ray_session, set_ray_environment
from jobs.settings.data import RaySettings
from qformer.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]

SESSION = """
import os
from jobs.cluster.session import ray_session
from jobs.settings.data import RaySettings

with ray_session(RaySettings(num_cpus=3)):
    import ray
    where = ray.get(ray.remote(lambda: __import__("jobs.settings.train").__file__).remote())
    # Only of its processes; a cluster that is joined keeps its preemption watcher.
    for name in ("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        print(os.environ.get(name), ray.get(ray.remote(lambda: os.environ.get(name)).remote()))
    with ray_session(RaySettings()):  # inside another session: used, and left running
        pass
    print(int(ray.cluster_resources()["CPU"]), where)
print(ray.is_initialized(), os.path.exists(os.path.expanduser("~/.ray")))
"""


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "INFO")
    set_ray_environment()
    assert os.environ["RAY_DATA_LOG_LEVEL"] == "INFO"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_address_where_nothing_listens_is_one_line():
    code = "from jobs.cluster.session import ray_session\nfrom jobs.settings.data import RaySettings\n"
    code += "ray_session(RaySettings(address='127.0.0.1:1')).__enter__()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "UserError: no Ray cluster listens at '127.0.0.1:1'" in done.stderr.splitlines()[-1]


def test_a_session_starts_and_stops_its_own_cluster_and_writes_no_token_file(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    # From another folder: workers must find the packages all the same.
    done = subprocess.run(
        [sys.executable, "-c", SESSION], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["None 0", "None 0", f"3 {REPOSITORY / 'jobs' / '__init__.py'}", "False False"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        (2, None),  # a busy machine, that has room at the third try
        (3, "Ray did not start here, 3 times .*: is this machine very busy"),
    ],
)
def test_a_busy_machine_is_asked_again(monkeypatch, failures, told):
    late = Exception("The current node timed out during startup. This could happen because")
    init = mock.Mock(side_effect=[*[late] * failures, None])
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # lest one be made for this process
    monkeypatch.setattr(ray, "init", init)
    if told is None:
        _start(RaySettings())
    else:
        with pytest.raises(UserError, match=told):
            _start(RaySettings())
    assert init.call_count == 3


def test_another_trouble_of_rays_is_not_taken_for_a_busy_machine(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setattr(ray, "init", mock.Mock(side_effect=ValueError("another")))
    with pytest.raises(ValueError, match="another"):
        _start(RaySettings())


def test_an_initialised_ray_is_used_and_left_alone(ray_local):
    with ray_session(RaySettings(address="127.0.0.1:1")):
        assert ray_local.is_initialized()
    assert ray_local.is_initialized()
