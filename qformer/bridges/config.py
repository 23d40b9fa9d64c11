"""How a bridge reads the frames of a clip, and its sound. Free of torch."""

import dataclasses
from dataclasses import dataclass, fields
from typing import Literal, get_args

from qformer.config import QFormerConfig

Temporal = Literal["concatenate", "mean", "cascaded", "spatio_temporal"]
KEPT_AUDIO = "features"
"""In the place of an audio encoder's name: the vectors that a feature cache keeps, whatever made them (ImageBind)."""
JOINED = ("cascaded", "spatio_temporal")
"""The ways after which there is one reading of a clip, with weights of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """How the frames of a clip become one reading; an image is a clip of one frame.

    Raises:
        ValueError: If a size is not positive, or the way is unknown.
    """

    temporal: Temporal = "concatenate"
    """concatenate: the query outputs of all frames, in time order (InstructBLIP's way). mean: their mean over frames,
    blind to order. cascaded: a second Q-Former over them (Video-LLaMA). spatio_temporal: one Q-Former over frames
    pooled over space and over time (Video Q-Former)."""
    max_frames: int = 32
    """Trained frame positions of cascaded and spatio_temporal; longer clips stretch them."""
    num_queries: int = 32
    """Of the second Q-Former of cascaded."""
    num_layers: int = 2
    """Of the second Q-Former of cascaded; each cross-attends."""
    freeze_frames: bool = True
    """cascaded: keep the frame Q-Former and the norm before it as they were loaded (Video-LLaMA)."""
    freeze_attention: bool = False
    """spatio_temporal: keep the Q-Former's attention as it was loaded, while poolings, queries, feed-forwards and heads
    are trained (the paper's first steps)."""
    num_spatial_queries: int = 32
    num_temporal_queries: int = 32
    num_summary_queries: int = 1
    """Of spatio_temporal: the paper has 64 of the first two together and leaves open how they are split."""

    def __post_init__(self) -> None:
        if self.temporal not in get_args(Temporal):
            raise ValueError(f"temporal={self.temporal!r} is none of {', '.join(get_args(Temporal))}")
        _require_positive(self)

    @property
    def group_sizes(self) -> tuple[int, int, int]:
        """Queries of spatio_temporal by kind: spatial, temporal, summary."""
        return self.num_spatial_queries, self.num_temporal_queries, self.num_summary_queries

    def reader(self, config: QFormerConfig) -> QFormerConfig:
        """Shapes of the Q-Former whose outputs are read, and which reads text where one does.

        Args:
            config: Of the Q-Former of an image, and of the text branch.
        """
        if self.temporal == "cascaded":
            return dataclasses.replace(
                config,
                encoder_width=config.hidden_size,
                num_layers=self.num_layers,
                num_queries=self.num_queries,
                cross_attention_frequency=1,
            )
        if self.temporal == "spatio_temporal":
            return dataclasses.replace(config, num_queries=sum(self.group_sizes))
        return config


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """A branch of the bridge that reads sound (Video-LLaMA, arXiv:2306.02858, section 2.1).

    Raises:
        ValueError: If a size is not positive.
    """

    encoder_width: int
    """Width of the frozen audio encoder's vectors, one a segment."""
    max_segments: int = 8
    """Trained segment positions; longer sound stretches them."""
    num_queries: int = 8
    num_layers: int = 2
    is_joint: bool = False
    """Read the sound with the frames, in the second Q-Former of cascaded, instead of beside them: one vector a frame,
    as wide as the Q-Former."""

    def __post_init__(self) -> None:
        _require_positive(self)

    def check(self, video: VideoConfig, config: QFormerConfig) -> None:
        """Refuse a bridge that it has no place in.

        Raises:
            ValueError: If sound is to be read with the frames where no second Q-Former reads them, or of another width.
        """
        if self.is_joint and (video.temporal, self.encoder_width) != ("cascaded", config.hidden_size):
            raise ValueError(
                f"joint sound of encoder_width={self.encoder_width} with temporal={video.temporal!r} and "
                f"hidden_size={config.hidden_size}: it needs temporal='cascaded' and equal widths; read it beside the "
                "frames (is_joint=False)"
            )


def _require_positive(config: VideoConfig | AudioConfig) -> None:
    for size in fields(config):
        if size.type is int and (value := getattr(config, size.name)) < 1:
            raise ValueError(f"{size.name}={value} must be at least 1")
