"""Backbones and bridge of a run, as the settings name them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qformer.bridges.config import AudioConfig
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig, bridge_config
from qformer.config import LoraConfig
from qformer.errors import UserError

_ALONE = "trains_alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """Backbones and bridge of a run, as the settings name them."""

    stage: int
    vision: str
    vision_pretrained: bool
    vision_layer: int
    language: str | None
    tokenizer: str
    """Hub name or folder; for a Q-Former with text branch."""
    max_text_tokens: int
    prompt: str
    num_frames: int
    qformer: Mapping[str, Any]
    """`QFormerConfig` fields that do not follow from the backbones."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How frames are chosen, for those who load the checkpoint."""
    vision_image_size: int | None = None
    qformer_init: str | None = None
    """BERT that the Q-Former starts from."""
    init_mismatch: str = "refuse"
    """"refuse" or "reinitialise"."""
    qformer_reads_prompt: bool = False
    """InstructBLIP: the prompt goes to the Q-Former as well as to the LM."""
    lavis_reduction: bool = False
    """Stage 1 equals LAVIS on several ranks, and not one process on the joined batch."""
    freeze_qformer: bool = False
    """MiniGPT-4: the projection alone is trained."""
    lora: LoraConfig | None = None
    bridge: BridgeConfig = IMAGE_BRIDGE
    """Kind and sizes of the bridge."""
    audio: str | None = None
    """Audio encoder; None: no sound."""
    audio_pretrained: bool = True
    audio_branch: Mapping[str, Any] = field(default_factory=dict)
    """`AudioConfig` but its width, and "trains_alone"."""
    segments: Mapping[str, Any] = field(default_factory=dict)
    """Of sound: `AudioSampling` but its rate, which is the encoder's."""

    def audio_config(self, encoder_width: int | None) -> AudioConfig | None:
        """The branch for sound; None without audio encoder.

        Args:
            encoder_width: Of the audio encoder's vectors.

        Raises:
            UserError: If its sizes do not go together.
        """
        if encoder_width is None:
            return None
        values = {name: value for name, value in self.audio_branch.items() if name != _ALONE}
        try:
            return AudioConfig(encoder_width=encoder_width, **values)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.audio_branch: {error}") from error

    @property
    def trains_audio_alone(self) -> bool:
        """Whether the branch for sound is all that is trained and read."""
        return bool(self.audio_branch.get(_ALONE, False))


def choice_from(
    model: Mapping[str, Any],
    *,
    stage: int,
    num_frames: int,
    tokenizer: str,
    sampling: Mapping[str, Any] | None = None,
    segments: Mapping[str, Any] | None = None,
) -> ModelChoice:
    """Build a `ModelChoice` from dumped model settings, whose keys are its fields."""
    names = {one.name for one in dataclasses.fields(ModelChoice)}
    values = {name: value for name, value in model.items() if name in names}
    if values.get("lora") is not None:
        values["lora"] = LoraConfig(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
    if "bridge" in values:
        values["bridge"] = bridge_config(values["bridge"])
    data: dict[str, Any] = {"num_frames": num_frames, "sampling": sampling or {}, "segments": segments or {}}
    return ModelChoice(**{**values, **data, "stage": stage, "tokenizer": tokenizer})
