"""Video-LLaMA's cascade: an image's Q-Former reads every frame, a second one reads what it said of all of them.

Dimensions: B batch, F frames, G = B * F, P tokens of a frame, V encoder width, Q queries of a frame, D hidden width.
Reference: Video-LLaMA (arXiv:2306.02858), section 2.1; its `video_llama.py` (encode_videoQformer_visual).
"""

import dataclasses

import torch
from torch import Tensor, nn

from qformer.bridges.audio_branch import Sound
from qformer.bridges.config import VideoConfig
from qformer.bridges.frames import Seen
from qformer.bridges.positions import FramePositions
from qformer.config import QFormerConfig
from qformer.model import QFormer

FRAMES_PER_PASS = 32
"""Frames read at a time. Where no gradient needs their keys and values, this bounds the memory of a clip of any length;
where one does, it keeps arrays small enough for a CPU's allocator to use their memory again.
"""


class CascadedFrames(nn.Module):
    """All frames' query outputs, with the position of their frame, as one sequence in time order.

    Args:
        config: Of the frame Q-Former, the same for every frame; it reads no text.
        video: See `VideoConfig`.
    """

    def __init__(self, config: QFormerConfig, video: VideoConfig) -> None:
        super().__init__()
        self.qformer = QFormer(dataclasses.replace(config, vocab_size=0))
        self.positions = FramePositions(video.max_frames, config.hidden_size)
        self.is_frozen = video.freeze_frames
        if self.is_frozen:
            self.qformer.requires_grad_(False)

    def train(self, mode: bool = True) -> "CascadedFrames":
        """Switch dropout; a frozen frame Q-Former stays in eval mode."""
        super().train(mode)
        if self.is_frozen:
            self.qformer.eval()
        return self

    def reader_of_encoder(self, qformer: QFormer) -> QFormer:
        """The frame Q-Former."""
        return self.qformer

    def forward(self, tokens_BFPV: Tensor, is_frame_BF: Tensor | None, sound: Sound | None = None) -> Seen:
        """Read every frame.

        Args:
            tokens_BFPV: Encoder tokens behind the norm.
            is_frame_BF: False at padding; None where there is none.
            sound: A vector for every frame, of the Q-Former's width; they follow the frames, with the same positions,
                and are read by a mask of their own.
        """
        batch, frames = tokens_BFPV.shape[:2]
        if is_frame_BF is None:
            is_frame_BF = torch.ones(batch, frames, dtype=torch.bool, device=tokens_BFPV.device)
        position_BFD = self.positions(is_frame_BF)
        hidden_BFQD = self._read(tokens_BFPV.flatten(0, 1)).unflatten(0, (batch, frames)) + position_BFD[:, :, None]
        hidden_BPD = hidden_BFQD.flatten(1, 2)
        is_token_BP = is_frame_BF.repeat_interleave(hidden_BFQD.shape[2], dim=1)
        if sound is not None:
            # Also beside a frame that only repeats another, as those of a slow clip do, there is sound of its own.
            is_heard_BF = sound.is_segment_BA.expand_as(is_frame_BF)
            heard_BFD = sound.audio_BAV.masked_fill(~is_heard_BF[..., None], 0.0) + position_BFD
            hidden_BPD, is_token_BP = (
                torch.cat(both, dim=1) for both in ((hidden_BPD, heard_BFD), (is_token_BP, is_heard_BF))
            )
        return Seen(hidden_BPD[:, None], is_token_BP)

    def _read(self, tokens_GPV: Tensor) -> Tensor:
        passes = tokens_GPV.split(FRAMES_PER_PASS)
        parts = [self.qformer.forward_queries(self.qformer.image_key_values(one)) for one in passes]
        return torch.cat([part.hidden_BQD for part in parts])
