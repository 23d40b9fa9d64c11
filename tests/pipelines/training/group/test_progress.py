"""The driver's polls of a run's status, also when the answer comes late or never."""

import logging
import time

from pipelines.training.group import progress
from pipelines.training.records.run_status import RunStatus
from tests.actors import kill_actor


class BusyStatus(RunStatus):
    """Does something else at times, as `RunCoordinator` does while it plans a segment."""

    def be_busy(self, seconds):
        time.sleep(seconds)


def test_messages_of_a_busy_actor_are_logged_later_and_once(ray_local, monkeypatch, caplog):
    status = ray_local.remote(BusyStatus).options(num_cpus=0).remote()
    ray_local.get(status.post.remote("ALARM of a worker"))
    status.be_busy.remote(2.0)
    poller = progress._StatusPoller(status)
    with caplog.at_level(logging.INFO):
        with monkeypatch.context() as patch:
            patch.setattr(progress, "_ANSWER_TIMEOUT_S", 0.5)
            assert poller.poll() == {} and not caplog.records
        ray_local.get(status.set_metrics.remote({"step": 1.0}))
        ray_local.get(status.post.remote("resuming"))
        assert [poller.poll() for _ in range(2)] == [{"step": 1.0}] * 2
    assert [record.message for record in caplog.records] == ["ALARM of a worker", "resuming"]
    kill_actor(status)
    assert poller.poll() == {}
