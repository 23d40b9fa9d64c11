"""Decode passes on a GPU, recorded once and replayed: the CPU launches a pass more slowly than the GPU runs it.

A recorded pass has fixed sizes, so there is one for 1, 2, 4, 8 ... rows and 128, 256, 512 ... columns. Padding rows
write to positions that no row reads.

Dimensions: B rows of the pass, V vocabulary.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer.generation.passes.slots import Slots

logger = logging.getLogger(__name__)

_MIN_COLUMNS = 128

DecodePass = Callable[[Tensor, slice, int], Tensor]
"""Function of ids, positions and targets [3, B], slots and number of columns; returns logits [B, V]."""
PassRecorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Function that records a call; returns its output, and a replay that recomputes it in place."""


@dataclass(frozen=True, slots=True)
class _Recording:
    packed_3B: Tensor
    """Inputs of the pass."""
    logits_BV: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """Recorded passes over one engine's slots.

    Args:
        slots: Slots that the passes read and write.
        device: Device of the passes.
        recorder: Factory of a recorder for all passes over the same memory.
    """

    def __init__(
        self, slots: Slots, device: torch.device, recorder: Callable[[torch.device], PassRecorder] | None = None
    ) -> None:
        self._slots, self._device = slots, device
        self._recorder = gpu_recorder if recorder is None else recorder
        self._record: PassRecorder = self._recorder(device)
        self._recorded: dict[tuple[int, int], _Recording | None] = {}
        self._version, self._is_off = slots.version, False

    def run(self, read: DecodePass, packed_3B: Tensor, columns: int) -> Tensor | None:
        """Run a pass; return logits [B, V], which the next call overwrites, or None if it must run unrecorded.

        The first pass of a size is not recorded: it loads and allocates, which a recording must not do.

        Args:
            read: The pass, the same function in every call.
            packed_3B: Ids, positions and targets of slots 0 to B - 1, in CPU memory.
            columns: Number of tokens of the longest row, including the new one.
        """
        slots, own = self._slots, packed_3B.shape[1]
        if self._version != slots.version:
            # The slots have new memory. Without any recording left, their memory pool is lost, too.
            self._recorded, self._record, self._version = {}, self._recorder(self._device), slots.version
        if self._is_off:
            return None
        rows, columns = (
            min(_power_of_two(own, 1), slots.num_rows),
            min(_power_of_two(columns, _MIN_COLUMNS), slots.capacity),
        )
        full_3B = self._filled(packed_3B, rows)
        if (rows, columns) not in self._recorded:
            self._recorded[rows, columns] = None
            return read(full_3B.to(self._device), slice(rows), columns)[:own]
        recorded = self._recorded[rows, columns] or self._new(read, full_3B, rows, columns)
        if recorded is None:
            return None
        recorded.packed_3B.copy_(full_3B)
        recorded.replay()
        return recorded.logits_BV[:own]

    def _filled(self, packed_3B: Tensor, rows: int) -> Tensor:
        """Add padding rows of id 0 at position 0, whose keys and values go to the end of their slot.

        If that slot belongs to a request with a partly read prompt, the request overwrites them before it reads.
        """
        own, capacity = packed_3B.shape[1], self._slots.capacity
        full_3B = F.pad(packed_3B, (0, rows - own))
        full_3B[2, own:] = torch.arange(own + 1, rows + 1) * capacity - 1
        return full_3B

    def _new(self, read: DecodePass, full_3B: Tensor, rows: int, columns: int) -> _Recording | None:
        packed_3B = full_3B.to(self._device)
        try:
            logits_BV, replay = self._record(lambda: read(packed_3B, slice(rows), columns))
        except Exception:
            self._is_off = True
            self._recorded.clear()
            logger.warning(
                "decoding runs unrecorded from now on: recording the language model's pass failed; that costs speed, "
                "and until a restart some of the GPU's memory",
                exc_info=True,
            )
            return None
        recorded = self._recorded[rows, columns] = _Recording(packed_3B, logits_BV, replay)
        return recorded


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def gpu_recorder(device: torch.device) -> PassRecorder:
    """Make a recorder of CUDA graphs, which share one memory pool and one stream."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Another thread may run an encoder at the same time, and allocate memory.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        # After a failed recording, torch does not leave its stream by itself.
        with torch.cuda.stream(stream), _without_collection(), recording:
            output = call()
        return output, graph.replay

    return record


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause garbage collection: freeing an older graph would end the recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
