"""The slots of the running requests, and their size.

A slot is as long as the longest running request can become, and there are as many as the budget allows. Generating
requests come first, so that their pass reads one contiguous block of memory.
"""

from qformer.generation.passes.slots import SlotMemory
from qformer.generation.requests.active_request import ActiveRequest

_CAPACITY_STEP = 64
"""Step in which slots grow, so that not every new length moves all of them."""


class RunningBatch:
    """The running requests by slot: the generating ones, then at most one with a partly read prompt.

    Args:
        slots: Memory of the slots.
        kv_tokens: Largest number of tokens in it.
        max_requests: Largest number of slots.
    """

    def __init__(self, slots: SlotMemory, kv_tokens: int, max_requests: int) -> None:
        self.slots, self.rows = slots, list[ActiveRequest]()
        self._kv_tokens, self._max_requests = kv_tokens, max_requests

    @property
    def num_generating(self) -> int:
        """Number of generating rows, which come first."""
        return sum(row.is_generating for row in self.rows)

    def most_tokens(self) -> int:
        """Longest slot that the budget allows for one more request; 0 if it allows none."""
        count = len(self.rows) + 1
        if count > self._max_requests:
            return 0
        if count == 1:
            return self._kv_tokens
        most = self._kv_tokens // count // _CAPACITY_STEP * _CAPACITY_STEP
        return most if max(row.tokens_needed for row in self.rows) <= most else 0

    def append(self, row: ActiveRequest) -> None:
        """Give a request the next slot, if `most_tokens` allows it."""
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
        """Free a request's slot and move the last ones up.

        Args:
            row: One of `rows`.
            is_broken: Whether its keys and values may have NaN.
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
