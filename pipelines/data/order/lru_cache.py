"""A least-recently-used cache with a size limit in bytes."""

import threading
from collections import OrderedDict
from typing import Any


class LruCache:
    """Keeps the most recently used values up to a number of bytes, and always the newest one. Thread-safe.

    Args:
        max_bytes: Limit for the sum of the values' sizes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._used_bytes = max_bytes, 0
        self._items: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The value of `key`; None if it is not in the cache."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Any, value: Any, size_bytes: int) -> None:
        """Store a new value."""
        with self._lock:
            self._items[key] = value, size_bytes
            self._used_bytes += size_bytes
            while self._used_bytes > self._max_bytes and len(self._items) > 1:
                self._used_bytes -= self._items.popitem(last=False)[1][1]
