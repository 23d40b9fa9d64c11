"""What an engine does and did, in figures."""

import collections
import threading
import time
from dataclasses import dataclass

_RECENT_S = 10.0
"""Rates and batch sizes are of so many seconds."""
_RECENT_REQUESTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """One look at an engine; totals count from its start."""

    queued: int
    running: int
    kv_tokens: int
    """The budget."""
    kv_tokens_reserved: int
    """Of it, what the running requests hold."""
    kv_bytes: int
    """What the whole budget takes in memory; 0 before the first request."""
    steps_total: int
    prompt_tokens_total: int
    completion_tokens_total: int
    finished_total: int
    failed_total: int
    cancelled_total: int
    refused_total: int
    """For a full queue."""
    tokens_per_s: float
    """Generated, of the last seconds; 0 when idle."""
    mean_batch_size: float
    """Requests of a step, of the last seconds."""
    time_to_first_token_p50_s: float
    """From queuing to the first token, of the last 1,024 requests."""
    time_to_first_token_p95_s: float


class EngineMeter:
    """Counts as an engine works; another thread may look."""

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
        """Count a step that generated so many tokens, one a request."""
        self.steps += 1
        self.completion_tokens += num_tokens
        with self._lock:
            self._steps.append((time.monotonic(), num_tokens))
            self._forget()

    def stats(
        self, *, queued: int, running: int, kv_tokens: int, kv_tokens_reserved: int, kv_bytes: int
    ) -> EngineStats:
        """Look at it."""
        with self._lock:
            self._forget()
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

    def _forget(self) -> None:
        oldest_s = time.monotonic() - _RECENT_S
        while self._steps and self._steps[0][0] < oldest_s:
            self._steps.popleft()
