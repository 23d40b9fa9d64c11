"""What is told of a request, and when."""

import asyncio
import logging
import time

from pipelines.serving.http import records
from pipelines.serving.http.records import RequestRecord, RequestReporter


def test_a_request_is_told_of_after_its_answer_with_the_time_that_it_took(caplog, monkeypatch):
    monkeypatch.setattr(records, "REPORT_DELAY_S", 0.2)

    async def run():
        record = RequestRecord(id="a", route="/v1/caption", status=200, started_s=time.perf_counter() - 1.5)
        RequestReporter().end(record)
        for _ in range(5):  # what an answer may still have to do
            await asyncio.sleep(0)
        assert not caplog.records
        await asyncio.sleep(0.4)

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        asyncio.run(run())
    [line] = caplog.records
    assert (line.qformer_request_id, line.endpoint, line.status) == ("a", "/v1/caption", 200)
    assert 1.5 <= line.seconds < 1.6
