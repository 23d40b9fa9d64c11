"""What `qformer serve` looks at before it serves, and what it does on SIGHUP."""

import logging
import os
import signal
import threading
import time

import pytest

from jobs.serve import job as serve
from jobs.settings.serve import ServeSettings
from qformer.errors import UserError
from tests.tiny_checkpoints import write_stage2


def test_every_byte_is_looked_at_before_it_is_served(tmp_path):
    checkpoint = write_stage2(tmp_path / "run" / "checkpoints" / "step-00000003")
    settings = ServeSettings(checkpoint=str(tmp_path / "run"))
    assert serve.resolve_service(settings).adapters[0].version == "run/step-00000003"
    file = checkpoint / "bridge.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"step-00000003 is damaged \(bridge.safetensors has other content") as caught:
        serve.resolve_service(settings)
    assert "name an earlier one" in str(caught.value)


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

    monkeypatch.setattr(serve, "resolve_service", meet)
    threading.Thread(target=hang_up).start()
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit):
        serve._reload_on_sighup(ServeSettings(checkpoint="run"), None)
    assert [record.getMessage() for record in caplog.records] == [
        "reload failed, still serving the previous adapters: run: no checkpoint",
        "reload failed, still serving the previous adapters: OSError('the store is away')",
        "reload failed, still serving the previous adapters: RuntimeError('no room for a replica')",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [False, True, True]
