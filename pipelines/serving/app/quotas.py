"""Limits of each API key: a token bucket for the request rate, leases for concurrent requests."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.serving.contract.config import ApiKey
from pipelines.serving.contract.errors import Refusal

BURST_S = 10.0
"""Capacity of the token bucket, as the time in which the rate fills it."""


@dataclass(slots=True)
class _Account:
    tokens: float
    filled_s: float
    leases: dict[int, float] = field(default_factory=dict)
    """Lease -> time at which it expires, for the case that its ingress replica is lost."""


class Quotas:
    """Request counts of each key.

    Args:
        lease_s: Longest duration of a request.
        clock: Monotonic time in seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._accounts: dict[str, _Account] = {}
        self._numbers = itertools.count(1)

    def take(self, key: ApiKey) -> int | Refusal:
        """Admit a request of `key`: a lease to release at its end, or a 429 refusal with the seconds to wait."""
        now_s = self._clock()
        account = self._accounts.setdefault(key.name, _Account(_burst(key), now_s))
        account.leases = {lease: end_s for lease, end_s in account.leases.items() if end_s > now_s}
        if key.max_concurrent is not None and len(account.leases) >= key.max_concurrent:
            message = f"this key may have {key.max_concurrent} requests in work at a time; wait for one to end"
            return Refusal(429, "too_many_concurrent_requests", message, retry_after_s=1)
        if key.requests_per_minute is not None:
            rate = key.requests_per_minute / 60.0
            account.tokens = min(_burst(key), account.tokens + (now_s - account.filled_s) * rate)
            account.filled_s = now_s
            if account.tokens < 1.0:
                wait_s = max(1, int((1.0 - account.tokens) / rate + 0.999))
                message = f"this key may make {key.requests_per_minute:g} requests a minute; wait {wait_s} s"
                return Refusal(429, "rate_limit_exceeded", message, retry_after_s=wait_s)
            account.tokens -= 1.0
        lease = next(self._numbers)
        account.leases[lease] = now_s + self._lease_s
        return lease

    def give_back(self, key: ApiKey, lease: int) -> None:
        """Release the lease of a request that has ended."""
        if (account := self._accounts.get(key.name)) is not None:
            account.leases.pop(lease, None)


def _burst(key: ApiKey) -> float:
    return max(1.0, (key.requests_per_minute or 0.0) / 60.0 * BURST_S)
