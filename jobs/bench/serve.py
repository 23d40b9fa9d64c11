"""The service under load against a one-at-a-time `transformers` loop behind the same HTTP server, in one run.

224-pixel JPEGs in chat requests to the demo's frozen models with a random bridge, fp32 on the CPU, one torch thread a
process; one replica, as `qformer serve` starts on one machine (`fused`). Three figures, measured in alternating rounds:

- `rps_vs_naive`: requests a second with 16 clients and 16 tokens an answer, ours / the loop's
  (`serve_peer.NaiveServer`).
- `added_p50_ms`: what HTTP, Ray Serve and all the hops add to the median time of one such request, with one client,
  over a call of the same decoder, encoder, bridge and engine in one process. Measured in short turns, because the speed
  of a shared machine changes within seconds.
- `short_p95_ratio`: the 95th percentile of 8-token answers, with one client, while a streamed 256-token answer is
  always in flight, / the same without it.

Requests a second, and the time of one with one client, are also measured with a separate process for each deployment,
as on a cluster.
"""

import base64
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.bench.data_media import write_jpegs
from jobs.bench.result import BenchResult
from jobs.bench.serve_load import Clients, Load, clients
from jobs.bench.serve_models import write_checkpoint
from jobs.cluster.session import ray_session, set_ray_environment
from jobs.serve.job import running_service
from jobs.settings.data import RaySettings
from jobs.settings.serve import ServeSettings
from pipelines.serving.contract.config import EncoderScale, GeneratorScale, IngressScale, MediaScale

if TYPE_CHECKING:
    from jobs.bench.serve_peer import DirectModel

QUESTION = "what is in the picture"
NAIVE_ROUTE = "/naive"
NUM_CPUS = 6
"""CPUs of Ray: the shares of the deployments and of the loop; the machine has fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeCase:
    """Sizes of the measurement."""

    rounds: int = 3
    jpegs: int = 64
    jpeg_bytes: int = 16_000
    clients: int = 16
    many: int = 320
    """Requests per round of all clients together."""
    few: int = 100
    """Requests per round of one client."""
    turn: int = 10
    """Requests of one client between equally many direct calls; a divisor of `few`."""
    warm_up: int = 32
    tokens: int = 16
    short_tokens: int = 8
    long_tokens: int = 256
    port: int = 8199


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bodies:
    """Files with requests, and the pictures in them."""

    images: list[bytes]
    plain: list[str]
    short: list[str]
    long: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """Figures of one round."""

    ours_rps: float
    naive_rps: float
    served_p50_s: float
    direct_p50_s: float
    short_p95_s: float
    short_with_long_p95_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _SeparateFigures:
    """Figures of a service with a process per deployment."""

    rps: float
    p50_s: float


def run() -> BenchResult:
    """Measure at full size."""
    return measure(ServeCase())


def measure(case: ServeCase) -> BenchResult:
    """Measure ours, the loop and direct calls alternately."""
    set_ray_environment()  # before the first import of ray
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as folder:
        root = Path(folder)
        checkpoint = write_checkpoint(root / "bench")
        bodies = _write_bodies(case, root)
        with clients() as load, ray_session(RaySettings(num_cpus=NUM_CPUS)):
            from jobs.bench.serve_peer import DirectModel

            loads = _ServerLoads(case, load, bodies)
            with _both_served(case, checkpoint, fused=True) as url:
                model = DirectModel(checkpoint)
                rounds = [_round(loads, url, model) for _ in range(case.rounds)]
            with _both_served(case, checkpoint, fused=False) as url:
                rps = loads.many(url)
                separate = _SeparateFigures(
                    rps=rps, p50_s=statistics.median(loads.one(url, bodies.plain, case.tokens, case.few))
                )
    return _result(rounds, separate)


def _result(rounds: list[_Round], separate: _SeparateFigures) -> BenchResult:
    def median(name: str) -> float:
        return statistics.median(getattr(one, name) for one in rounds)

    added_s = statistics.median(one.served_p50_s - one.direct_p50_s for one in rounds)
    return BenchResult(
        bench="serve",
        seconds={
            "one request, served, p50": median("served_p50_s"),
            "one request, direct, p50": median("direct_p50_s"),
            "one request, served by deployments of their own, p50": separate.p50_s,
            "short answer, p95": median("short_p95_s"),
            "short answer beside a long one, p95": median("short_with_long_p95_s"),
        },
        ratios={
            "rps_vs_naive": statistics.median(one.ours_rps / one.naive_rps for one in rounds),
            "added_p50_ms": 1000 * added_s,
            "short_p95_ratio": statistics.median(one.short_with_long_p95_s / one.short_p95_s for one in rounds),
        },
        rates={
            "ours, 16 clients, requests/s": median("ours_rps"),
            "loop, 16 clients, requests/s": median("naive_rps"),
            "deployments of their own, 16 clients, requests/s": separate.rps,
        },
    )


@contextmanager
def _both_served(case: ServeCase, checkpoint: Path, *, fused: bool) -> Iterator[str]:
    """Ours at `/` and the loop at `NAIVE_ROUTE` of one HTTP proxy; yields its address."""
    from ray import serve

    from jobs.bench.serve_peer import naive_app

    settings = ServeSettings(
        checkpoint=str(checkpoint),
        port=case.port,
        fused=fused,
        ingress=IngressScale(max_replicas=1),
        media=MediaScale(max_replicas=1),
        encoder=EncoderScale(max_replicas=1),
        generator=GeneratorScale(max_replicas=1),
    )
    with running_service(settings) as url:
        serve.run(naive_app(checkpoint), name="naive", route_prefix=NAIVE_ROUTE)
        yield url


class _ServerLoads:
    """Measurements of a server."""

    def __init__(self, case: ServeCase, load: Clients, bodies: _Bodies) -> None:
        self.case, self.bodies, self._load = case, bodies, load

    def many(self, url: str) -> float:
        """Requests per second of all clients, after a warm-up."""
        for num_requests in (self.case.warm_up, self.case.many):
            load = Load(
                url=f"{url}/v1/chat/completions",
                bodies=self.bodies.plain,
                num_tokens=self.case.tokens,
                concurrency=self.case.clients,
                num_requests=num_requests,
            )
            rps = num_requests / self._load.measure(load).seconds
        return rps

    def one(
        self, url: str, files: list[str], num_tokens: int, num_requests: int, companion: str | None = None
    ) -> list[float]:
        """Seconds of each request of one client."""
        load = Load(
            url=f"{url}/v1/chat/completions",
            bodies=files,
            num_tokens=num_tokens,
            concurrency=1,
            num_requests=num_requests,
            companion=companion,
        )
        return list(self._load.measure(load).latencies_s)


def _round(loads: _ServerLoads, url: str, model: "DirectModel") -> _Round:
    case, bodies = loads.case, loads.bodies
    ours_rps, naive_rps = loads.many(url), loads.many(url + NAIVE_ROUTE)
    served, direct = _in_turns(loads, url, model)
    short = loads.one(url, bodies.short, case.short_tokens, case.few)
    with_long = loads.one(url, bodies.short, case.short_tokens, case.few, bodies.long)
    figures = _Round(
        ours_rps=ours_rps,
        naive_rps=naive_rps,
        served_p50_s=statistics.median(served),
        direct_p50_s=statistics.median(direct),
        short_p95_s=_p95(short),
        short_with_long_p95_s=_p95(with_long),
    )
    print(f"round: {figures}", flush=True)
    return figures


def _in_turns(loads: _ServerLoads, url: str, model: "DirectModel") -> tuple[list[float], list[float]]:
    """Seconds of served requests and of direct calls, after a warm-up turn of both."""
    case, bodies = loads.case, loads.bodies
    served: list[float] = []
    direct: list[float] = []
    for first in range(-case.turn, case.few, case.turn):
        which = [(first + number) % len(bodies.images) for number in range(case.turn)]
        some_served = loads.one(url, [bodies.plain[one] for one in which], case.tokens, case.turn)
        some_direct = [_direct(model, bodies.images[one], case.tokens) for one in which]
        if first >= 0:
            served += some_served
            direct += some_direct
    return served, direct


def _direct(model: "DirectModel", image: bytes, num_tokens: int) -> float:
    start_s = time.perf_counter()
    model.answer(image, QUESTION, num_tokens)
    return time.perf_counter() - start_s


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]


def _write_bodies(case: ServeCase, root: Path) -> _Bodies:
    images = [Path(path).read_bytes() for path in write_jpegs(root / "jpegs", case.jpegs, (224, 224), case.jpeg_bytes)]

    def write(kind: str, num_tokens: int, *, stream: bool = False) -> list[str]:
        files = []
        for place, image in enumerate(images):
            file = root / f"{kind}-{place:04d}.json"
            file.write_text(json.dumps(_body(image, num_tokens, stream=stream)))
            files.append(str(file))
        return files

    return _Bodies(
        images=images,
        plain=write("plain", case.tokens),
        short=write("short", case.short_tokens),
        long=write("long", case.long_tokens, stream=True)[0],
    )


def _body(image: bytes, num_tokens: int, *, stream: bool) -> dict[str, object]:
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": num_tokens, "stream": stream}
