"""Decode passes on a GPU, recorded once and replayed: the processor needs longer to launch a pass than a GPU to run it.

A recorded pass has fixed sizes, so that there is one for 1, 2, 4, 8 ... rows and 128, 256, 512 ... columns. Rows that
fill one up write where nobody reads.

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

_FEWEST = 128

DecodePass = Callable[[Tensor, slice, int], Tensor]
"""Ids, positions and targets [3, B], slots and number of columns to logits [B, V]."""
PassRecorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""A call to what it returns, and what computes it again into the same memory from what its inputs hold by then."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    packed_3B: Tensor
    """Where the pass reads its inputs."""
    logits_BV: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """Recorded passes over one engine's slots.

    Args:
        slots: Whose memory the passes read and write.
        device: That computes.
        recorder: Makes what records on a device, for all passes over the same memory.
    """

    def __init__(
        self, slots: Slots, device: torch.device, recorder: Callable[[torch.device], PassRecorder] | None = None
    ) -> None:
        self._slots, self._device = slots, device
        self._recorder = gpu_recorder if recorder is None else recorder
        self._record: PassRecorder = self._recorder(device)
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}
        self._version, self._is_off = slots.version, False

    def run(self, read: DecodePass, packed_3B: Tensor, columns: int) -> Tensor | None:
        """Logits [B, V], which the next call overwrites; None where this pass has to run as it is.

        The first pass of a size is not recorded: much is loaded and taken then that a recording must not do.

        Args:
            read: The pass, the same every time.
            packed_3B: Ids, positions and targets of slots 0 to B - 1, in the processor's memory.
            columns: Tokens of the longest row, the new one with them.
        """
        slots, own = self._slots, packed_3B.shape[1]
        if self._version != slots.version:
            # Their memory is another by now; and where no recording is left, its pool is lost too.
            self._recorded, self._record, self._version = {}, self._recorder(self._device), slots.version
        if self._is_off:
            return None
        rows, columns = min(_power_of_two(own, 1), slots.num_rows), min(_power_of_two(columns, _FEWEST), slots.capacity)
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
        """With rows of id 0 at position 0, whose keys and values go to the end of their slot.

        If the slot is a request's whose prompt is being read, it writes there itself before it reads.
        """
        own, capacity = packed_3B.shape[1], self._slots.capacity
        full_3B = F.pad(packed_3B, (0, rows - own))
        full_3B[2, own:] = torch.arange(own + 1, rows + 1) * capacity - 1
        return full_3B

    def _new(self, read: DecodePass, full_3B: Tensor, rows: int, columns: int) -> _Recorded | None:
        packed_3B = full_3B.to(self._device)
        try:
            logits_BV, replay = self._record(lambda: read(packed_3B, slice(rows), columns))
        except Exception:
            self._is_off = True
            self._recorded.clear()
            logger.warning(
                "decoding runs unrecorded from here on: recording the language model's pass failed; that costs speed, "
                "and until a restart some of the GPU's memory",
                exc_info=True,
            )
            return None
        recorded = self._recorded[rows, columns] = _Recorded(packed_3B, logits_BV, replay)
        return recorded


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def gpu_recorder(device: torch.device) -> PassRecorder:
    """Records as CUDA graphs, which share one pool of memory and one stream."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # An encoder may run in another thread meanwhile, and take memory.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        # After a recording that failed torch does not leave its stream by itself.
        with torch.cuda.stream(stream), _without_collection(), recording:
            output = call()
        return output, graph.replay

    return record


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """An older graph that the collector happens to free ends the recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
