"""Turns at a few CPU cores: a lock that is handed on in the order of asking."""

import threading


class FairLock:
    """Held by one of several models in a process while it computes.

    Side by side they fight for Python's lock, and each goes on with the few requests that it has; in turns their
    batches grow, and a request costs less of the processor. Python's own lock may be taken again and again by whoever
    holds it, so that a thread with many short passes would never let another in.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._last = self._now = 0

    def __enter__(self) -> None:
        with self._condition:
            ticket, self._last = self._last, self._last + 1
            self._condition.wait_for(lambda: self._now == ticket)

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._now += 1
            self._condition.notify_all()
