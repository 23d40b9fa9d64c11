"""What a running `qformer serve` does on SIGHUP; tests/pipelines/serving/test_serving_app.py does it to a service."""

import logging
import os
import signal
import threading
import time

import pytest

from jobs import serve
from jobs.settings import ServeSettings
from qformer.errors import UserError


@pytest.fixture
def _hangup_handler():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hangup_handler")
def test_whatever_a_hangup_meets_the_service_goes_on(monkeypatch, caplog):
    met = [UserError("run: no checkpoint"), OSError("the store is away"), RuntimeError("no room for a replica")]
    left = iter([*met, SystemExit(0)])

    def meet(settings):
        hang_up()  # the next one
        raise next(left)

    def hang_up():
        while signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(serve, "what_to_serve", meet)
    threading.Thread(target=hang_up).start()
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit):
        serve._renew_on_hangup(ServeSettings(checkpoint="run"), None)
    assert [record.getMessage() for record in caplog.records] == [
        "still serving what was: run: no checkpoint",
        "still serving what was: OSError('the store is away')",
        "still serving what was: RuntimeError('no room for a replica')",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [False, True, True]
