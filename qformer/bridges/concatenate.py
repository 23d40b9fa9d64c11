"""InstructBLIP's way: the query outputs of all frames, in time order. Of an image it is BLIP-2's bridge.

Reference: InstructBLIP (arXiv:2305.06500), section 2.5.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.qformer_bridge import QFormerBridge


@dataclass(frozen=True, kw_only=True, slots=True)
class ConcatenateConfig(BaseBridgeConfig):
    """The query outputs of all frames, in time order (InstructBLIP's way)."""

    is_image_qformer: ClassVar[bool] = True
    kind: Literal["concatenate"] = "concatenate"


class Concatenate(QFormerBridge):
    """Every frame is read by itself, and all outputs are read further."""
