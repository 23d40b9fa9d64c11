"""What is told of a request, and when."""

import asyncio
import logging

from pipelines.serving.records import TOLD_AFTER_S, Record, Reporter


def test_a_request_is_told_of_after_its_answer_with_the_time_that_it_took(caplog):
    async def run():
        record = Record(id="a", route="/v1/caption", status=200)
        Reporter().end(record)
        assert not caplog.records
        await asyncio.sleep(20 * TOLD_AFTER_S)
        return record

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        record = asyncio.run(run())
    [line] = caplog.records
    assert (line.qformer_request_id, line.endpoint, line.status) == ("a", "/v1/caption", 200)
    assert line.seconds == round(record.seconds, 4) and record.seconds < TOLD_AFTER_S
