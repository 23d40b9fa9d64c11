"""Learned positions of a clip's frames, or of its sound's segments.

Dimensions: B batch, F frames, D width, M trained positions.
"""

import torch
from torch import Tensor, nn

from qformer.model import INITIAL_STD


class FramePositions(nn.Module):
    """A learned vector for each of the first `max_frames` frames.

    A frame's position is its number among the clip's real frames, so that padding moves none. A clip of more frames
    than were trained has the table stretched over it: its first and last frame get the first and last vector, those in
    between a mix of the two nearest. A clip that fits has the vectors themselves, as Video-LLaMA does.
    """

    def __init__(self, max_frames: int, width: int) -> None:
        super().__init__()
        self.table_MD = nn.Parameter(torch.empty(max_frames, width))
        nn.init.normal_(self.table_MD, std=INITIAL_STD)

    def forward(self, is_frame_BF: Tensor) -> Tensor:
        """Vectors [B, F, D]; those of padding are some real frame's."""
        last = len(self.table_MD) - 1
        rank_BF = (is_frame_BF.long().cumsum(dim=1) - 1).clamp(min=0)
        # Frames that fit keep whole numbers, which make the mix below exact.
        stretch_B1 = (rank_BF.amax(dim=1, keepdim=True) / max(last, 1)).clamp(min=1.0)
        place_BF = (rank_BF / stretch_B1).clamp(max=last)
        below_BF = place_BF.floor().long()
        above_BF = (below_BF + 1).clamp(max=last)
        share_BF1 = (place_BF - below_BF)[..., None].to(self.table_MD.dtype)
        return self.table_MD[below_BF] * (1 - share_BF1) + self.table_MD[above_BF] * share_BF1
