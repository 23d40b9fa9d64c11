"""Log line and Prometheus metrics of each request. They never contain content of requests or answers."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from pipelines.serving.contract.adapters import Adapter

logger = logging.getLogger("ray.serve")
"""Logger of Ray Serve, which writes to its own files, as JSON where the deployment is configured so."""

REPORT_DELAY_S = 0.001
"""Delay between the end of a request and its report. The answer is sent first, and the report, which takes most of a
millisecond of CPU time, is done before the same client's next request arrives."""

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


@dataclass(slots=True)
class RequestRecord:
    """Measurements of one request."""

    id: str
    route: str
    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    adapter: Adapter | None = None
    key: str | None = None
    """Name of the API key."""
    status: int = 499
    """HTTP status; 499 until the client has the whole answer, and if it disconnects before. A stream that breaks off
    has the status of its error event."""
    error: str | None = None
    """Error code of the answer."""
    body_bytes: int = 0
    num_media: int = 0
    num_frames: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_streamed: bool = False
    first_token_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    """Seconds from the start of the request to the end of each stage."""

    def finish_stage(self, stage: str) -> None:
        """Record the end of a stage."""
        self.stages_s[stage] = self.seconds

    def first_token(self) -> None:
        """Record the time of the first piece of the answer."""
        if self.first_token_s is None:
            self.first_token_s = self.seconds

    @property
    def seconds(self) -> float:
        """Duration from the start to the end, or until now."""
        return (time.perf_counter() if self.ended_s is None else self.ended_s) - self.started_s

    def fields(self) -> dict[str, Any]:
        """Fields of the log line."""
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


class RequestReporter:
    """Logs requests at their end and updates the metrics."""

    def __init__(self) -> None:
        prefix, tags = "qformer_serve", ("endpoint", "adapter")
        self._requests = Counter(f"{prefix}_requests_total", "Requests by status.", tag_keys=(*tags, "status"))
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "Total time of a request.", boundaries=_SECONDS, tag_keys=tags
        )
        self._first = Histogram(
            f"{prefix}_first_token_seconds",
            "Time to the first piece of a streamed answer.",
            boundaries=_SECONDS,
            tag_keys=tags,
        )
        self._tokens = Counter(
            f"{prefix}_tokens_total", "Tokens of prompts and completions.", tag_keys=("adapter", "kind")
        )
        self._in_work = Gauge(f"{prefix}_requests_in_work", "Concurrent requests of an ingress replica.")

    def count(self, num_in_work: int) -> None:
        """Set the gauge of concurrent requests."""
        self._in_work.set(num_in_work)

    def end(self, record: RequestRecord) -> None:
        """Report a request that has ended, after `REPORT_DELAY_S`."""
        record.ended_s = time.perf_counter()
        asyncio.get_running_loop().call_later(REPORT_DELAY_S, self._report, record)

    def _report(self, record: RequestRecord) -> None:
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
