"""What stage 1 and stage 2 share: the norm on the encoder's tokens, the frames of a clip, and the Q-Former.

Dimensions: B batch, F frames, P image tokens, V encoder width, Q queries, D hidden width, G = B * F.
"""

import torch
from torch import Tensor, nn

from qformer.bridges.audio_branch import Sound
from qformer.bridges.cascaded import CascadedFrames
from qformer.bridges.config import VideoConfig
from qformer.bridges.frames import Seen, SeparateFrames, mean_over_frames
from qformer.bridges.spatio_temporal import SpatioTemporalFrames, freeze_attention, give_experts
from qformer.config import QFormerConfig
from qformer.model import QFormer


class ClipReader(nn.Module):
    """Reads clips, and images as clips of one frame.

    Args:
        config: Of the Q-Former of an image, and of its text branch if any.
        video: How frames are joined; by default they are not.
    """

    frames: SeparateFrames | CascadedFrames | SpatioTemporalFrames

    def __init__(self, config: QFormerConfig, video: VideoConfig | None = None) -> None:
        super().__init__()
        self.video = video or VideoConfig()
        self.vision_norm = nn.LayerNorm(config.encoder_width, eps=config.vision_norm_eps)
        self.qformer = QFormer(self.video.reader(config))
        match self.video.temporal:
            case "cascaded":
                self.frames = CascadedFrames(config, self.video)
                self.vision_norm.requires_grad_(not self.video.freeze_frames)
            case "spatio_temporal":
                self.frames = SpatioTemporalFrames(config, self.video)
                give_experts(self.qformer.layers, self.video.group_sizes)
                if self.video.freeze_attention:
                    freeze_attention(self.qformer.layers)
            case _:
                self.frames = SeparateFrames()

    def perceive(self, image_BFPV: Tensor, is_frame_BF: Tensor | None = None, sound: Sound | None = None) -> Seen:
        """What the Q-Former reads of clips.

        Args:
            image_BFPV: Frozen encoder tokens.
            is_frame_BF: False at frames that are padding, at least one of each clip being none; None: none is.
            sound: See `CascadedFrames`, which alone takes it.
        """
        if is_frame_BF is not None:
            # NaN in them would live through a weight of zero.
            image_BFPV = image_BFPV.masked_fill(~is_frame_BF[:, :, None, None], 0.0)
        tokens_BFPV = self.vision_norm(image_BFPV)
        return self.frames(tokens_BFPV, is_frame_BF, *([] if sound is None else [sound]))

    def check_image(self, image_BFPV: Tensor, is_frame_BF: Tensor | None = None) -> None:
        """Refuse encoder tokens that do not fit, and a mask of other frames.

        Raises:
            ValueError: Naming both sides.
        """
        self.frames.reader_of_encoder(self.qformer).check_image(image_BFPV, "BFPV")
        if is_frame_BF is None:
            return
        if is_frame_BF.shape != image_BFPV.shape[:2] or is_frame_BF.dtype != torch.bool:
            raise ValueError(
                f"the mask of frames is {is_frame_BF.dtype} {tuple(is_frame_BF.shape)} but the image tokens are "
                f"{tuple(image_BFPV.shape)}; give every frame of every clip one torch.bool"
            )
        if not is_frame_BF.any(dim=1).all():
            raise ValueError("a clip has no frame that is not padding; leave the clip out, or mark its first frame")

    def pooled(self, hidden_BFQD: Tensor, is_frame_BF: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Query outputs as they are read further, and which of their frames are no padding."""
        if self.video.temporal == "mean":
            return mean_over_frames(hidden_BFQD, is_frame_BF)[:, None], None
        return hidden_BFQD, is_frame_BF
