"""Clients of the serving benchmark, in a process of their own: a line of JSON in is a load, a line out its latencies.

Closed loops: each of `concurrency` clients sends its next request when the last one is answered. With `companion`, one
more client asks for streamed answers of that body, one after the other, all the while.
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
    """What is asked of a server."""

    url: str
    """Of POST /v1/chat/completions."""
    bodies: Sequence[str]
    """Files with requests, taken in turns."""
    num_tokens: int
    """That each answer must have."""
    concurrency: int
    num_requests: int
    companion: str | None = None
    """File with a streamed request that is in flight all the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """What came of it."""

    seconds: float
    """From the first request to the last answer."""
    latencies_s: Sequence[float]
    """Of the requests in order of their answers."""
    num_companions: int
    """Streamed answers that ended meanwhile."""


class Clients:
    """The other process, seen from the benchmark."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, load: Load) -> LoadResult:
        """Run one load.

        Raises:
            RuntimeError: If a client met an error; it is on stderr.
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
                begun_s = time.perf_counter()
                await _ask(session, load, bodies[number % len(bodies)])
                latencies_s.append(time.perf_counter() - begun_s)

        async with _companion(session, load) as counts:
            begun_s = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(load.concurrency)))
            seconds = time.perf_counter() - begun_s
            num_companions = len(counts)
    return LoadResult(seconds=seconds, latencies_s=latencies_s, num_companions=num_companions)


async def _ask(session: aiohttp.ClientSession, load: Load, body: bytes) -> None:
    async with session.post(load.url, data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer[:500]!r}")
    tokens = json.loads(answer)["usage"]["completion_tokens"]
    if tokens != load.num_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {load.num_tokens}")


@asynccontextmanager
async def _companion(session: aiohttp.ClientSession, load: Load) -> AsyncIterator[list[int]]:
    """Streams that follow each other; yields once the first one talks, and counts those that have ended."""
    ended: list[int] = []
    if load.companion is None:
        yield ended
        return
    body, has_begun = Path(load.companion).read_bytes(), asyncio.Event()

    async def talk() -> None:
        while True:
            async with session.post(load.url, data=body, headers={"Content-Type": "application/json"}) as response:
                response.raise_for_status()
                events = 0
                async for line in response.content:
                    if line.startswith(b"data:"):
                        events += 1
                        has_begun.set()
            ended.append(events)

    talking = asyncio.create_task(talk())
    waiting = asyncio.create_task(has_begun.wait())
    try:
        await asyncio.wait([talking, waiting], return_when=asyncio.FIRST_COMPLETED)
        yield ended
        if talking.done():
            talking.result()
    finally:
        talking.cancel()
        waiting.cancel()


def main() -> None:
    """Answer loads until the input ends."""
    for line in sys.stdin:
        print(json.dumps(asdict(asyncio.run(measure(Load(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
