"""What the configs of all bridges share, and the branch that reads sound. Free of torch."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from qformer.config import QFormerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseBridgeConfig:
    """What every bridge's config says of its bridge; each narrows `kind` to a literal and adds its sizes.

    Raises:
        ValueError: If a size is not positive.
    """

    stages: ClassVar[frozenset[int]] = frozenset({1, 2})
    """Stages that can train it."""
    term_names: ClassVar[tuple[str, ...]] = ()
    """Its own loss terms, which `Reading.terms` holds at every step."""
    is_image_qformer: ClassVar[bool] = False
    """Whether its weights are those of BLIP-2's Q-Former and nothing else: such bridges start one another, and others,
    and have a place in Hugging Face's layouts."""
    takes_joint_audio: ClassVar[bool] = False
    """Whether it reads sound together with the frames (`BridgeInput.sound`)."""

    kind: str
    """Name of the bridge, which each config narrows to its own."""

    def __post_init__(self) -> None:
        require_positive(self)

    @property
    def keeps_loaded(self) -> str | None:
        """Name of the setting by which weights stay as they were loaded, so that a run must start from others."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioBranchSizes:
    """Sizes of the branch for sound that a user chooses (Video-LLaMA, arXiv:2306.02858, section 2.1).

    Raises:
        ValueError: If a size is not positive.
    """

    num_queries: int = 8
    num_layers: int = 2
    max_segments: int = 8
    """Trained segment positions; longer sound stretches them."""
    is_joint: bool = False
    """Read the sound with the frames, in the second Q-Former of a cascaded bridge, and not in a branch of its own: one
    vector a frame, as wide as the Q-Former."""

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig(AudioBranchSizes):
    """The sizes with what follows from the frozen audio encoder."""

    encoder_width: int
    """Width of the encoder's vectors, one a segment."""

    def check(self, bridge: BaseBridgeConfig, config: QFormerConfig) -> None:
        """Refuse a bridge that it has no place in.

        Raises:
            ValueError: If the bridge cannot read sound with the frames but shall, or vectors of another width.
        """
        if self.is_joint and not (bridge.takes_joint_audio and self.encoder_width == config.hidden_size):
            raise ValueError(
                f"joint sound of encoder_width={self.encoder_width} with kind={bridge.kind!r} and "
                f"hidden_size={config.hidden_size}: it needs kind='cascaded' and equal widths; read it in a "
                "branch of its own (is_joint=False)"
            )


def require_positive(config: Any) -> None:
    """Refuse sizes of a dataclass that are below 1.

    Raises:
        ValueError: Naming the first.
    """
    for size in fields(config):
        if size.type in (int, "int") and (value := getattr(config, size.name)) < 1:
            raise ValueError(f"{size.name}={value} must be at least 1")
