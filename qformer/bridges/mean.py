"""The mean of the frames' query outputs, blind to their order.

Dimensions: B batch, F frames, Q queries, D hidden width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.frames import mean_over_frames
from qformer.bridges.qformer_bridge import QFormerBridge


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanConfig(BaseBridgeConfig):
    """The mean of the frames' query outputs, blind to their order."""

    is_image_qformer: ClassVar[bool] = True
    kind: Literal["mean"] = "mean"


class Mean(QFormerBridge):
    """Every frame is read by itself; ITG and ITM see all of them, other readers their mean."""

    def pooled(self, hidden_BFQD: Tensor, is_frame_BF: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One set of outputs a clip."""
        return mean_over_frames(hidden_BFQD, is_frame_BF)[:, None], None
