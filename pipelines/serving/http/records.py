"""What is told of each request: one structured log line and a few Prometheus figures. Never what was asked or sent."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from pipelines.serving.contract.adapters import Adapter

logger = logging.getLogger("ray.serve")
"""Serve writes it to its own files, as JSON where the deployment asks for that."""

TOLD_AFTER_S = 0.001
"""From a request's end, for its answer to leave first, and short, for the same client's next request comes some
milliseconds later: to tell of one takes most of a millisecond, which a model that computes meanwhile waits for."""

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


@dataclass(slots=True)
class Record:
    """One request as it goes on."""

    id: str
    route: str
    begun_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    adapter: Adapter | None = None
    key: str | None = None
    """Name of the API key."""
    status: int = 499
    """As answered; 499 while the client has no whole answer, and when it left before. Of a stream that broke off, what
    its error event says."""
    error: str | None = None
    """Code of the refusal."""
    body_bytes: int = 0
    num_media: int = 0
    num_frames: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_streamed: bool = False
    first_token_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    """Seconds until each stage was done, from the beginning."""

    def reached(self, stage: str) -> None:
        """Note that a stage is done."""
        self.stages_s[stage] = self.seconds

    def first_token(self) -> None:
        """Note that the first piece of the answer is there."""
        if self.first_token_s is None:
            self.first_token_s = self.seconds

    @property
    def seconds(self) -> float:
        """From the beginning to the end, or until now."""
        return (time.perf_counter() if self.ended_s is None else self.ended_s) - self.begun_s

    def fields(self) -> dict[str, Any]:
        """For the log."""
        return {
            "qformer_request_id": self.id,
            "endpoint": self.route,
            "adapter": self.adapter and self.adapter.version,
            "key": self.key,
            "status": self.status,
            "error": self.error,
            "is_streamed": self.is_streamed,
            "body_bytes": self.body_bytes,
            "num_media": self.num_media,
            "num_frames": self.num_frames,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 4),
            "first_token_s": self.first_token_s and round(self.first_token_s, 4),
            "stages_s": {stage: round(seconds, 4) for stage, seconds in self.stages_s.items()},
        }


class Reporter:
    """Writes records down when requests end."""

    def __init__(self) -> None:
        prefix, of_adapter = "qformer_serve", ("endpoint", "adapter")
        self._requests = Counter(
            f"{prefix}_requests_total", "Requests by what they were answered.", tag_keys=(*of_adapter, "status")
        )
        self._seconds = Histogram(f"{prefix}_request_seconds", "Time in all.", boundaries=_SECONDS, tag_keys=of_adapter)
        self._first = Histogram(
            f"{prefix}_first_token_seconds", "Time to the first piece.", boundaries=_SECONDS, tag_keys=of_adapter
        )
        self._tokens = Counter(f"{prefix}_tokens_total", "Tokens.", tag_keys=("adapter", "kind"))
        self._in_work = Gauge(f"{prefix}_requests_in_work", "Requests in an ingress replica.")

    def count(self, num_in_work: int) -> None:
        """Tell how many requests are in work."""
        self._in_work.set(num_in_work)

    def end(self, record: Record) -> None:
        """Tell of a request that has ended, soon."""
        record.ended_s = time.perf_counter()
        asyncio.get_running_loop().call_later(TOLD_AFTER_S, self._tell, record)

    def _tell(self, record: Record) -> None:
        adapter = record.adapter.name if record.adapter else ""
        tags = {"endpoint": record.route, "adapter": adapter}
        self._requests.inc(1, tags={**tags, "status": str(record.status)})
        self._seconds.observe(max(record.seconds, 1e-6), tags=tags)
        if record.first_token_s is not None:
            self._first.observe(record.first_token_s, tags=tags)
        for kind, count in (("prompt", record.prompt_tokens), ("completion", record.completion_tokens)):
            if count:
                self._tokens.inc(count, tags={"adapter": adapter, "kind": kind})
        logger.info("request", extra=record.fields())
