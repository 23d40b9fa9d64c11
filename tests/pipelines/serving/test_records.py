"""What is told of a request, and when."""

import asyncio
import logging

from pipelines.serving.records import Record, Reporter


def test_a_request_is_told_of_after_its_answer_with_the_time_that_it_took(caplog):
    async def run():
        record = Record(id="a", route="/v1/caption", status=200)
        Reporter().end(record)
        assert not caplog.records
        seconds = record.seconds
        await asyncio.sleep(0.1)
        return seconds

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        seconds = asyncio.run(run())
    [line] = caplog.records
    assert (line.qformer_request_id, line.endpoint, line.status) == ("a", "/v1/caption", 200)
    assert line.seconds == round(seconds, 4)
