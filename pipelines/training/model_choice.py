"""Backbones and bridge of a run, as the settings name them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qformer.config import LoraConfig
from qformer.video.config import Temporal


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
    temporal: Temporal = "concatenate"
    """How the frames of a clip are joined."""
    video: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of `VideoConfig`."""


def choice_from(
    model: Mapping[str, Any], *, stage: int, num_frames: int, tokenizer: str, sampling: Mapping[str, Any] | None = None
) -> ModelChoice:
    """Build a `ModelChoice` from dumped model settings, whose keys are its fields."""
    names = {one.name for one in dataclasses.fields(ModelChoice)}
    values = {name: value for name, value in model.items() if name in names}
    if values.get("lora") is not None:
        values["lora"] = LoraConfig(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
    return ModelChoice(
        **{**values, "stage": stage, "num_frames": num_frames, "sampling": sampling or {}, "tokenizer": tokenizer}
    )
