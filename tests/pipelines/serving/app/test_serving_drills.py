"""Drills under load, without retries by the clients: replicas killed, a checkpoint rolled over, load up and down."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from jobs.serve.config import serve_config
from jobs.serve.job import APP_NAME
from jobs.settings.serve import ServeSettings
from pipelines.serving.contract.config import EncoderScale, GeneratorScale, IngressScale, MediaScale, RequestLimits
from qformer.config import GenerationSettings
from tests.media_files import jpeg_bytes
from tests.metrics_endpoint import endpoints
from tests.tiny_checkpoints import write_stage2

pytestmark = pytest.mark.slow

# Replicas of a busy machine take long to start; a request waits for them.
PATIENCE_S = 300.0
LONG = 100
SOON = {"upscale_delay_s": 1.0, "downscale_delay_s": 5.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with one checkpoint, whose language model never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    checkpoint = write_stage2(folder / "checkpoints" / "step-00000003")
    file = checkpoint.with_name(checkpoint.name + "-language") / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "suppress_tokens": [settings["eos_token_id"]]}))
    return folder


@pytest.fixture(scope="module")
def settings(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ServeSettings(
        checkpoint=str(run),
        port=port,
        requests=RequestLimits(timeout_s=PATIENCE_S),
        generation=GenerationSettings(max_new_tokens=8),
        ingress=IngressScale(num_cpus=0.25, max_replicas=1),
        media=MediaScale(num_cpus=0.25, min_replicas=0, max_replicas=1, to_zero_delay_s=10.0, **SOON),
        encoder=EncoderScale(num_cpus=0.25, max_replicas=1),
        generator=GeneratorScale(num_cpus=0.25, max_replicas=3, target_requests=0.5, **SOON),
    )


def deploy(settings):
    """What `serve deploy` does with the file of `qformer serve --write-config`."""
    config = yaml.safe_load(yaml.safe_dump(serve_config(settings)))
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))


@pytest.fixture(scope="module")
def url(ray_local, settings):
    serve.start(http_options=serve_config(settings)["http_options"])
    deploy(settings)
    until(lambda: serve.status().applications[APP_NAME].status == "RUNNING")
    yield f"http://{settings.host}:{settings.port}"
    serve.shutdown()


class Load:
    """Threads that chat until they are told to stop."""

    def __init__(self, url, num_threads=3, max_tokens=8, *, is_streamed=False):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
        self.max_tokens, self.is_streamed, self.models, self.errors = max_tokens, is_streamed, [], []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(num_threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, seed):
        while not self._is_over.is_set():
            try:
                answer = self.client.chat.completions.create(
                    model="tiny",
                    messages=[turn(seed)],
                    max_tokens=self.max_tokens,
                    temperature=0,
                    stream=self.is_streamed,
                )
                if self.is_streamed:
                    *_, answer = answer
                    assert answer.choices[0].finish_reason == "length"
                self.models.append(answer.model)
            except Exception as error:
                self.errors.append(error)

    def more(self, count=6):
        """Wait until so many more are answered."""
        wanted = len(self.models) + count
        until(lambda: len(self.models) >= wanted or self.errors)
        assert not self.errors


def turn(seed=0):
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(seed)).decode()
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def until(is_so, timeout_s=PATIENCE_S):
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def replica_pids(deployment):
    """Processes of a deployment's replicas below this one; others on the machine may serve as well."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            if command.startswith(f"ray::ServeReplica:{APP_NAME}:{deployment}") and os.getpid() in ancestors(folder):
                found.append(int(folder.name))
    return found


def ancestors(folder):
    while (pid := int((folder / "stat").read_text().rpartition(")")[2].split()[1])) > 1:
        yield pid
        folder = Path("/proc") / str(pid)


def num_running(deployment):
    status = serve.status().applications[APP_NAME].deployments[deployment]
    return status.replica_states.get("RUNNING", 0)


def kill(deployment):
    """Kill its one replica and wait until Serve has started another."""
    [pid] = replica_pids(deployment)
    os.kill(pid, signal.SIGKILL)
    until(lambda: (now := replica_pids(deployment)) and pid not in now)


@pytest.mark.parametrize("deployment", ["Generator", "Encoder", "Media"])
def test_a_replica_that_is_killed_costs_no_request(url, deployment):
    with Load(url) as load:
        load.more()
        kill(deployment)
        load.more()
    assert not load.errors


@pytest.mark.parametrize(("deployment", "num_cut"), [("Generator", 3), ("Encoder", 0), ("Media", 0)])
def test_a_replica_that_is_killed_cuts_only_the_streams_that_it_writes(url, deployment, num_cut):
    with Load(url, num_cut or 3, max_tokens=LONG, is_streamed=True) as load:
        load.more()
        kill(deployment)
        cut = take_errors(load)
        load.more()
    assert not load.errors and len(cut) <= num_cut
    assert all(isinstance(error, openai.APIError) and error.code == "unavailable" for error in cut)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_ingress_that_is_killed_costs_what_it_works_on_and_nothing_after(url, ray_local, is_streamed):
    """Nobody is left who could answer in JSON: the proxy says 500 and counts it, or breaks a stream off."""
    num_before = num_counted(ray_local)
    with Load(url, max_tokens=LONG, is_streamed=is_streamed) as load:
        load.more()
        kill("Ingress")
        lost = take_errors(load)
        load.more()
    assert not load.errors and len(lost) <= 3
    refused = [error for error in lost if isinstance(error, openai.InternalServerError)]
    assert all(error.status_code == 500 for error in refused)
    assert all(isinstance(error, openai.APIConnectionError | httpx.HTTPError) for error in lost if error not in refused)
    until(lambda: num_counted(ray_local) >= num_before + len(refused), 30)


def num_counted(ray):
    """Requests that Serve's proxy counts as failed, by its own figures."""
    pattern = r"^ray_serve_num_http_error_requests\w*\{.*\} (\S+)$"
    return sum(map(float, re.findall(pattern, endpoints(ray), re.MULTILINE)))


def take_errors(load):
    taken = load.errors[:]
    del load.errors[: len(taken)]
    return taken


def test_a_newer_checkpoint_is_taken_without_a_failed_request_or_a_restart(url, run, settings):
    with Load(url) as load:
        load.more()
        before = {name: replica_pids(name) for name in ("Ingress", "Encoder", "Generator")}
        write_stage2(
            run / "checkpoints" / "step-00000004",
            language=run / "checkpoints" / "step-00000003-language",
            seed=9,
        )
        deploy(settings)
        until(lambda: load.models[-1] == "tiny/step-00000004")
        load.more()
        assert {name: replica_pids(name) for name in before} == before
    assert not load.errors and set(load.models) == {"tiny/step-00000003", "tiny/step-00000004"}


def test_a_stream_whose_replica_dies_ends_with_an_error_event(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def answer(seed, **fields):
        return client.chat.completions.create(
            model="tiny", messages=[turn(seed)], temperature=0, max_tokens=LONG, **fields
        )

    pids = replica_pids("Generator")
    chunks = answer(0, stream=True)
    next(chunks)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ask again") as cut:
        list(chunks)
    assert cut.value.code == "unavailable"
    assert answer(0).usage.completion_tokens == LONG


def test_replicas_come_and_go_with_the_load(url):
    until(lambda: num_running("Generator") == 1)
    with Load(url, num_threads=12, max_tokens=60) as load:
        until(lambda: num_running("Generator") == 3)
        load.more(1)
    assert not load.errors
    until(lambda: num_running("Generator") == 1)
    until(lambda: num_running("Media") == 0)
    assert httpx.get(f"{url}/healthz").status_code == 200
    with Load(url, num_threads=1) as load:
        load.more(1)
        assert num_running("Media") == 1
    assert not load.errors
