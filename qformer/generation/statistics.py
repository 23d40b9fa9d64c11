"""Statistics of an engine."""

import collections
import threading
import time
from dataclasses import dataclass

_RECENT_S = 10.0
"""Time window of rates and batch sizes."""
_RECENT_REQUESTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Snapshot of an engine; totals count from its start."""

    queued: int
    running: int
    kv_tokens: int
    """Budget of tokens with stored keys and values."""
    kv_tokens_reserved: int
    """Part of the budget that running requests use."""
    kv_bytes: int
    """Memory of the whole budget; 0 before the first request."""
    steps_total: int
    prompt_tokens_total: int
    completion_tokens_total: int
    finished_total: int
    failed_total: int
    cancelled_total: int
    refused_total: int
    """Requests refused because the queue was full."""
    tokens_per_s: float
    """Generated tokens per second in the last seconds; 0 when idle."""
    mean_batch_size: float
    """Mean number of requests in a step in the last seconds."""
    time_to_first_token_p50_s: float
    """Median time from queuing to the first token, over the last 1,024 requests."""
    time_to_first_token_p95_s: float


class EngineMeter:
    """Counters of a running engine; another thread may read them."""

    def __init__(self) -> None:
        self.steps = self.prompt_tokens = self.completion_tokens = 0
        self.finished = self.failed = self.cancelled = self.refused = 0
        self._first_token_s: collections.deque[float] = collections.deque(maxlen=_RECENT_REQUESTS)
        self._steps: collections.deque[tuple[float, int]] = collections.deque()
        self._lock = threading.Lock()

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """Count a prompt that was read."""
        self.prompt_tokens += prompt_tokens
        with self._lock:
            self._first_token_s.append(seconds)

    def step(self, num_tokens: int) -> None:
        """Count a step that generated `num_tokens` tokens, one a request."""
        self.steps += 1
        self.completion_tokens += num_tokens
        with self._lock:
            self._steps.append((time.monotonic(), num_tokens))
            self._drop_old_steps()

    def stats(
        self, *, queued: int, running: int, kv_tokens: int, kv_tokens_reserved: int, kv_bytes: int
    ) -> EngineStats:
        """Take a snapshot."""
        with self._lock:
            self._drop_old_steps()
            steps, waits = list(self._steps), sorted(self._first_token_s)
        tokens = sum(count for _, count in steps)
        busy_s = steps[-1][0] - steps[0][0] if len(steps) > 1 else 0.0
        return EngineStats(
            queued=queued,
            running=running,
            kv_tokens=kv_tokens,
            kv_tokens_reserved=kv_tokens_reserved,
            kv_bytes=kv_bytes,
            steps_total=self.steps,
            prompt_tokens_total=self.prompt_tokens,
            completion_tokens_total=self.completion_tokens,
            finished_total=self.finished,
            failed_total=self.failed,
            cancelled_total=self.cancelled,
            refused_total=self.refused,
            tokens_per_s=tokens / busy_s if busy_s else 0.0,
            mean_batch_size=tokens / len(steps) if steps else 0.0,
            time_to_first_token_p50_s=waits[len(waits) // 2] if waits else 0.0,
            time_to_first_token_p95_s=waits[int(len(waits) * 0.95)] if waits else 0.0,
        )

    def _drop_old_steps(self) -> None:
        oldest_s = time.monotonic() - _RECENT_S
        while self._steps and self._steps[0][0] < oldest_s:
            self._steps.popleft()
