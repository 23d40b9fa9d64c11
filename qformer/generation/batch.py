"""Which running request has which slot, and how large the slots are.

Slots are as long as the longest running request may become, and there are as many as the budget then holds. Requests
that generate lie in front, so that their pass looks at one piece of memory.
"""

from qformer.generation.passes.slots import SlotMemory
from qformer.generation.requests.active_request import ActiveRequest

_CAPACITY_STEP = 64
"""Slots grow in such steps, lest every new length moves all of them."""


class RunningBatch:
    """The running requests by slot: those that generate, then at most one whose prompt is read in part.

    Args:
        slots: Their memory.
        kv_tokens: Most tokens of it.
        max_requests: Most slots.
    """

    def __init__(self, slots: SlotMemory, kv_tokens: int, max_requests: int) -> None:
        self.slots, self.rows = slots, list[ActiveRequest]()
        self._kv_tokens, self._max_requests = kv_tokens, max_requests

    @property
    def num_generating(self) -> int:
        """Rows in front that generate."""
        return sum(row.is_generating for row in self.rows)

    def most_tokens(self) -> int:
        """Longest slot of one more request that the budget holds; 0 where it holds none."""
        count = len(self.rows) + 1
        if count > self._max_requests:
            return 0
        if count == 1:
            return self._kv_tokens
        most = self._kv_tokens // count // _CAPACITY_STEP * _CAPACITY_STEP
        return most if max(row.tokens_needed for row in self.rows) <= most else 0

    def append(self, row: ActiveRequest) -> None:
        """Give a request the next slot; `most_tokens` allowed it."""
        count, capacity = len(self.rows) + 1, self._capacity_with(row)
        slots = self.slots
        if slots.capacity < capacity or count * slots.capacity > self._kv_tokens:
            most = self._kv_tokens // capacity
            slots.resize(min(max(slots.num_rows, count), most), capacity, len(self.rows))
        if slots.num_rows < count:
            most = min(self._max_requests, self._kv_tokens // slots.capacity)
            slots.resize(min(2 * count, most), slots.capacity, len(self.rows))
        self.rows.append(row)

    def remove(self, row: ActiveRequest, *, is_broken: bool = False) -> None:
        """Free a request's slot; the last ones move up.

        Args:
            row: One of `rows`.
            is_broken: Its keys and values may hold NaN.
        """
        place = self.rows.index(row)
        last = self.num_generating - 1
        if is_broken:
            self.slots.clear(place)
        for source in (last, len(self.rows) - 1):
            if source > place:
                self._move(source, place)
                place = source
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        row = self.rows[source]
        self.slots.move(source, target, row.num_cached)
        self.rows[target] = row

    def _capacity_with(self, row: ActiveRequest) -> int:
        longest = max(other.tokens_needed for other in [row, *self.rows])
        return min(-(-longest // _CAPACITY_STEP) * _CAPACITY_STEP, self._kv_tokens)
