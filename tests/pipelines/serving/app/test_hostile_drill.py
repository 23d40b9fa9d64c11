"""2,000 hostile requests to the whole service on Ray Serve: refused, nothing kept, and well afterwards."""

import asyncio
import os
import socket
import time
from collections import Counter

import httpx
import pytest

from jobs.serve.job import running_service
from jobs.settings.serve import ServeSettings
from pipelines.serving.contract.config import RequestLimits
from qformer.config import GenerationSettings
from tests.pipelines.serving.hostile_requests import CAPTION, CHAT, hostile_requests
from tests.pipelines.serving.hostile_sockets import NO_HTTP, answer_to, chat, dawdlers, hang_up_early, hang_up_in_stream
from tests.pipelines.serving.http.test_hostile_requests import assert_healthy, assert_no_growth, refusals
from tests.pipelines.serving.schemathesis_run import schemathesis_program, wrong_requests
from tests.process_trees import holdings
from tests.tiny_checkpoints import write_stage1, write_stage2

pytestmark = pytest.mark.slow

MAX_BODY_BYTES = 3_000_000
NUM_REQUESTS = 2000


@pytest.fixture(scope="module")
def url(ray_local, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServeSettings(
        checkpoint=str(write_stage2(runs / "tiny")),
        adapters={"search": str(write_stage1(runs / "search"))},
        port=port,
        requests=RequestLimits(max_body_bytes=MAX_BODY_BYTES, body_timeout_s=3.0),
        generation=GenerationSettings(max_new_tokens=8),
    )
    with running_service(settings) as url:
        yield url


def serve_processes():
    """Replicas, proxy and decoders."""
    names = ("ServeReplica", "ProxyActor", "video_child")
    return holdings(os.getpid(), lambda command: any(name in command for name in names))


def test_two_thousand_hostile_requests(url, tmp_path):
    assert_healthy(url)
    requests = list(hostile_requests(3, MAX_BODY_BYTES, search="search"))
    # Once around, so that allocators, caches and thread pools have what they will keep.
    statuses = asyncio.run(refusals(url, requests))
    rude(url)
    before = serve_processes()
    generated = wrong_requests(schemathesis_program(tmp_path), url, tmp_path, max_examples=250)
    assert [(name, status) for name, status in generated if not 400 <= status < 500] == []
    asyncio.run(refusals(url, requests))
    rude(url)
    time.sleep(5)  # what hung up is noticed
    after = serve_processes()
    statuses += Counter(status for _, status in generated)
    print(f"\n{len(requests)} written, {len(generated)} generated: {dict(sorted(statuses.items()))}")
    for pid in sorted(before.keys() & after.keys()):
        megabytes = [holding[pid][0] / 2**20 for holding in (before, after)]
        files = [holding[pid][1] for holding in (before, after)]
        print(f"process {pid}: {megabytes[0]:.1f} MB, then {megabytes[1]:.1f}; {files[0]} files, then {files[1]}")
    assert statuses.total() >= NUM_REQUESTS
    assert_no_growth(before, after)
    assert_healthy(url)
    assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200


def rude(url):
    """Broken HTTP, bodies and heads that never end, and clients that leave."""
    for request in NO_HTTP:
        line = answer_to(url, request)
        assert line == b"" or line.split()[1].startswith(b"4"), line
    for number in range(20):
        hang_up_early(url, CHAT, chat("a ball" * 1000), number / 20)
    for _ in range(20):
        assert b" 200 " in hang_up_in_stream(url, CHAT, chat("a ball", stream=True, max_tokens=100)).split(b"\r\n")[0]
    with dawdlers(url, CAPTION, 40):
        assert_healthy(url)
        time.sleep(4)
        assert_healthy(url)
