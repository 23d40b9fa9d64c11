"""Clients of the serving benchmark, in a separate process: reads loads and writes latencies, as lines of JSON.

Closed loops: each of `concurrency` clients sends its next request when the last one is answered. With `companion`,
another client requests streamed answers of that body the whole time.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Requests to a server."""

    url: str
    """URL of POST /v1/chat/completions."""
    bodies: Sequence[str]
    """Files with requests, used in rotation."""
    num_tokens: int
    """Required number of tokens per answer."""
    concurrency: int
    num_requests: int
    companion: str | None = None
    """File with a streamed request that runs the whole time; None: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """Measurements of one load."""

    seconds: float
    """Time from the first request to the last answer."""
    latencies_s: Sequence[float]
    """Latencies in order of the answers."""
    num_companions: int
    """Number of streamed answers that ended meanwhile."""


class Clients:
    """Handle of the clients' process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, load: Load) -> LoadResult:
        """Run one load.

        Raises:
            RuntimeError: If a client failed; its error is on stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(load)), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients' process has died; see its error above")
        return LoadResult(**json.loads(line))


@contextmanager
def clients() -> Iterator[Clients]:
    """Start the process for the length of a `with` block."""
    command = [sys.executable, "-m", __name__]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=root
    ) as process:
        try:
            yield Clients(process)
        finally:
            process.kill()


async def measure(load: Load) -> LoadResult:
    """Run one load in this process."""
    bodies = [Path(file).read_bytes() for file in load.bodies]
    latencies_s: list[float] = []
    numbers = iter(range(load.num_requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for number in numbers:
                start_s = time.perf_counter()
                await _request(session, load, bodies[number % len(bodies)])
                latencies_s.append(time.perf_counter() - start_s)

        async with _companion(session, load) as counts:
            start_s = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(load.concurrency)))
            seconds = time.perf_counter() - start_s
            num_companions = len(counts)
    return LoadResult(seconds=seconds, latencies_s=latencies_s, num_companions=num_companions)


async def _request(session: aiohttp.ClientSession, load: Load, body: bytes) -> None:
    async with session.post(load.url, data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer[:500]!r}")
    tokens = json.loads(answer)["usage"]["completion_tokens"]
    if tokens != load.num_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {load.num_tokens}")


@asynccontextmanager
async def _companion(session: aiohttp.ClientSession, load: Load) -> AsyncIterator[list[int]]:
    """Run streams one after the other; yields at the first event, and counts those that have ended."""
    ended: list[int] = []
    if load.companion is None:
        yield ended
        return
    body, has_begun = Path(load.companion).read_bytes(), asyncio.Event()

    async def stream_answers() -> None:
        while True:
            async with session.post(load.url, data=body, headers={"Content-Type": "application/json"}) as response:
                response.raise_for_status()
                events = 0
                async for line in response.content:
                    if line.startswith(b"data:"):
                        events += 1
                        has_begun.set()
            ended.append(events)

    streaming = asyncio.create_task(stream_answers())
    waiting = asyncio.create_task(has_begun.wait())
    try:
        await asyncio.wait([streaming, waiting], return_when=asyncio.FIRST_COMPLETED)
        yield ended
        if streaming.done():
            streaming.result()
    finally:
        streaming.cancel()
        waiting.cancel()


def main() -> None:
    """Run loads until the input ends."""
    for line in sys.stdin:
        print(json.dumps(asdict(asyncio.run(measure(Load(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
