"""The branch of a bridge that reads sound.

Dimensions: B batch, A segments of sound, V width of the audio encoder's vectors, N soft prompts, L the language model's
width.
Reference: Video-LLaMA (arXiv:2306.02858), section 2.1; its `video_llama.py` (encode_audioQformer).
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qformer.bridges.config import AudioConfig
from qformer.bridges.positions import FramePositions
from qformer.config import QFormerConfig
from qformer.model import QFormer


class Sound(NamedTuple):
    """What the frozen audio encoder made of the sound of clips."""

    audio_BAV: Tensor
    """A vector a segment."""
    is_segment_BA: Tensor
    """False at segments that are not there; a clip without sound has none."""

    @classmethod
    def absent(cls, clips: int, width: int, device: torch.device) -> "Sound":
        """The value for clips that have none."""
        none_B1 = torch.zeros(clips, 1, dtype=torch.bool, device=device)
        return cls(torch.zeros(clips, 1, width, device=device), none_B1)

    def check(self, clips: int, frames: int | None, width: int) -> None:
        """Refuse sound that does not fit a bridge, or its clips.

        Args:
            clips: Number of clips.
            frames: Number of segments that there must be, one a frame; None: any number.
            width: Width of the vectors that the bridge takes.

        Raises:
            ValueError: Naming both sides.
        """
        shape, mask = tuple(self.audio_BAV.shape), tuple(self.is_segment_BA.shape)
        segments = frames or (shape[1] if len(shape) > 1 else 0)
        if shape != (clips, segments, width) or mask != shape[:2]:
            raise ValueError(
                f"sound is {shape} with a mask {mask} but these {clips} clips and the bridge take "
                f"[{clips}, {frames or 'segments'}, {width}] with a mask of the first two (encoder_width={width}); use "
                "the audio encoder it was trained with (model.audio), and of joint sound one segment a frame"
            )


class AudioBranch(nn.Module):
    """Vectors of sound, with the position of their segment, through a Q-Former of their own to soft prompts.

    Args:
        config: The image's Q-Former, whose width, heads and dropout the branch has too.
        audio: Sizes of the branch.
        language_width: Width of the language model's embeddings.
    """

    def __init__(self, config: QFormerConfig, audio: AudioConfig, language_width: int) -> None:
        super().__init__()
        self.positions = FramePositions(audio.max_segments, audio.encoder_width)
        self.qformer = QFormer(
            dataclasses.replace(
                config,
                encoder_width=audio.encoder_width,
                num_layers=audio.num_layers,
                num_queries=audio.num_queries,
                cross_attention_frequency=1,
                vocab_size=0,
            )
        )
        self.language_projection = nn.Linear(config.hidden_size, language_width)

    @property
    def num_queries(self) -> int:
        """N."""
        return self.qformer.config.num_queries

    def forward(self, sound: Sound) -> Tensor:
        """Soft prompts [B, N, L]; those of a clip without sound mean nothing and are for the caller to leave out."""
        audio_BAV, is_segment_BA = sound
        is_first_A = torch.arange(is_segment_BA.shape[1], device=is_segment_BA.device) == 0
        is_read_BA = is_segment_BA | (is_first_A & ~is_segment_BA.any(dim=1, keepdim=True))
        # A segment keeps its place in time, also behind segments without sound.
        position_BAV = self.positions(torch.ones_like(is_segment_BA))
        placed_BAV = audio_BAV.masked_fill(~is_segment_BA[..., None], 0.0) + position_BAV
        queries = self.qformer.forward_queries(self.qformer.image_key_values(placed_BAV), is_read_BA)
        return self.language_projection(queries.hidden_BQD)
