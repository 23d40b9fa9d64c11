"""Video-LLaMA's cascade: an image's Q-Former reads every frame, a second one reads the outputs of all of them.

Dimensions: B batch, F frames, G = B * F, P tokens of a frame, V encoder width, Q queries of a frame, D hidden width.
Reference: Video-LLaMA (arXiv:2306.02858), section 2.1; its `video_llama.py` (encode_videoQformer_visual).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.positions import FramePositions
from qformer.bridges.protocol import Bridge, BridgeInput, Percept, WeightStart
from qformer.bridges.qformer_bridge import QFormerBridge
from qformer.config import QFormerConfig
from qformer.model import QFormer

FRAMES_PER_PASS = 32
"""Frames read at a time. Where no gradient needs their keys and values, this bounds the memory of a clip of any length;
where one does, it keeps arrays small enough for a CPU's allocator to use their memory again.
"""
_TEXT = (".text_ffn.", "word_embeddings.", "position_embeddings.", "lm_dense.", "lm_norm.", "lm_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class CascadedConfig(BaseBridgeConfig):
    """A second Q-Former over the frames' query outputs (Video-LLaMA)."""

    takes_joint_audio: ClassVar[bool] = True
    kind: Literal["cascaded"] = "cascaded"
    max_frames: int = 32
    """Trained frame positions; longer clips stretch them."""
    num_queries: int = 32
    """Queries of the second Q-Former."""
    num_layers: int = 2
    """Layers of the second Q-Former, all of which cross-attend."""
    freeze_frames: bool = True
    """Keep the Q-Former of the frames and the norm before it as `init_from` has them (Video-LLaMA)."""

    @property
    def keeps_loaded(self) -> str | None:
        """See `BaseBridgeConfig.keeps_loaded`."""
        return "freeze_frames" if self.freeze_frames else None

    def reader(self, qformer: QFormerConfig) -> QFormerConfig:
        """Shapes of the second Q-Former, which reads text where one does."""
        return dataclasses.replace(
            qformer,
            encoder_width=qformer.hidden_size,
            num_layers=self.num_layers,
            num_queries=self.num_queries,
            cross_attention_frequency=1,
        )


class Cascaded(QFormerBridge):
    """All frames' query outputs, with the position of their frame, as one sequence in time order.

    Args:
        config: Config of this bridge.
        qformer: Shapes of the frames' Q-Former, which reads no text.
    """

    def __init__(self, config: CascadedConfig, qformer: QFormerConfig) -> None:
        super().__init__(config, qformer, config.reader(qformer))
        self.frames = FrameReader(qformer, config)
        self.vision_norm.requires_grad_(not config.freeze_frames)

    @property
    def image_qformer(self) -> QFormer | None:
        """The Q-Former of the frames."""
        return self.frames.qformer

    def frozen_parts(self, *, is_whole: bool) -> Mapping[str, nn.Module]:
        """The second Q-Former where nothing is trained, else the one of the frames, unless it is trained too."""
        if is_whole:
            return {"qformer": self.qformer}
        return {"qformer": self.frames.qformer} if self.frames.is_frozen else {}

    def start_from(self, weights: Mapping[str, Tensor], source: BaseBridgeConfig) -> WeightStart | None:
        """An image's Q-Former reads the frames; the second begins anew, as in Video-LLaMA."""
        if not source.is_image_qformer:
            return Bridge.start_from(self, weights, source)
        own = "qformer."
        renamed = {f"frames.{name}" if name.startswith(own) else name: tensor for name, tensor in weights.items()}
        new = [name for name in self.state_dict() if name.startswith((own, "frames.positions."))]
        return WeightStart(renamed, new, _TEXT)

    def perceive(self, given: BridgeInput) -> Percept:
        """One sequence of all frames' outputs, then one of the sound, with the same positions and a mask of its own.

        Sound is a vector for every frame, of the Q-Former's width.
        """
        tokens_BFPV, is_frame_BF, sound = self.normed(given), given.is_frame_BF, given.sound
        batch, frames = tokens_BFPV.shape[:2]
        if is_frame_BF is None:
            is_frame_BF = torch.ones(batch, frames, dtype=torch.bool, device=tokens_BFPV.device)
        position_BFD = self.frames.positions(is_frame_BF)
        hidden_BFQD = self.frames(tokens_BFPV.flatten(0, 1)).unflatten(0, (batch, frames)) + position_BFD[:, :, None]
        hidden_BPD = hidden_BFQD.flatten(1, 2)
        is_token_BP = is_frame_BF.repeat_interleave(hidden_BFQD.shape[2], dim=1)
        if sound is not None:
            # A frame that only repeats another, as those of a slow clip do, has sound of its own.
            is_sound_BF = sound.is_segment_BA.expand_as(is_frame_BF)
            sound_BFD = sound.audio_BAV.masked_fill(~is_sound_BF[..., None], 0.0) + position_BFD
            hidden_BPD, is_token_BP = (
                torch.cat(both, dim=1) for both in ((hidden_BPD, sound_BFD), (is_token_BP, is_sound_BF))
            )
        return Percept(hidden_BPD[:, None], is_token_BP)


class FrameReader(nn.Module):
    """The Q-Former of the frames, and the positions of what it makes of them."""

    def __init__(self, qformer: QFormerConfig, config: CascadedConfig) -> None:
        super().__init__()
        self.qformer = QFormer(dataclasses.replace(qformer, vocab_size=0))
        self.positions = FramePositions(config.max_frames, qformer.hidden_size)
        self.is_frozen = config.freeze_frames
        if self.is_frozen:
            self.qformer.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrameReader":
        """Switch dropout; a frozen Q-Former stays in eval mode."""
        super().train(mode)
        if self.is_frozen:
            self.qformer.eval()
        return self

    def forward(self, tokens_GPV: Tensor) -> Tensor:
        """Query outputs of every frame, [G, Q, D]."""
        passes = tokens_GPV.split(FRAMES_PER_PASS)
        parts = [self.qformer.forward_queries(self.qformer.image_key_values(one)) for one in passes]
        return torch.cat([part.hidden_BQD for part in parts])
