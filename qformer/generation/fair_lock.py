"""A lock that is granted in the order of requests."""

import threading


class FairLock:
    """A first-come, first-served lock for several models in one process that compute on the CPU.

    In parallel they compete for Python's global lock, each with a small batch. In sequence their batches grow, and a
    request takes less CPU time. `threading.Lock` is not fair: a thread with many short passes could take it again and
    again, and starve another one.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next_ticket = self._current = 0

    def __enter__(self) -> None:
        with self._condition:
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            self._condition.wait_for(lambda: self._current == ticket)

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._current += 1
            self._condition.notify_all()
