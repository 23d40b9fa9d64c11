"""Settings of the model and of its optimizer."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from jobs.settings.data import Settings
from jobs.settings.specs import Audio, Language, Vision
from pipelines.training.run.model_choice import AudioBranchOptions
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig
from qformer.config import LoraConfig, QFormerSizes

Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class ModelSettings(Settings):
    """Frozen backbones and the bridge between them."""

    vision: Vision
    """Frozen vision encoder; a string alone is its name."""
    audio: Audio | None = None
    """Frozen audio encoder, for stage 2; a string alone is its name; null: no sound."""
    audio_branch: AudioBranchOptions = AudioBranchOptions()
    language: Language | None = None
    """Frozen language model, for stage 2, decoder-only or T5; a string alone is its name."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of the Q-Former: hub name, local folder, or "corpus" to learn WordPiece from the captions. If
    `init_from` has a tokenizer, a Q-Former that reads text takes that one."""
    max_text_tokens: int = Field(default=32, ge=4)
    """Length limit of captions and prompts; longer ones are cut at the end, and counted."""
    prompt: str = ""
    """Text before every caption in stage 2, not part of the loss; a row's instruction replaces it."""
    qformer_reads_prompt: bool = False
    """Stage 2: give prompt or instruction to the Q-Former as well as to the language model (InstructBLIP)."""
    lavis_reduction: bool = False
    """Stage 1: reduce over workers as LAVIS does: gathered features without gradient, ITG over own tokens."""
    freeze_qformer: bool = False
    """Stage 2: train the projection to the language model alone (MiniGPT-4); needs `init_from`."""
    lora: LoraConfig | None = None
    """Stage 2: low-rank updates of the language model, which are trained too; null: none."""
    bridge: Annotated[BridgeConfig, Field(discriminator="kind")] = IMAGE_BRIDGE
    """Bridge from the frames of a clip to the soft prompts; the other keys depend on `kind`. An image is a clip of one
    frame."""
    qformer: QFormerSizes = QFormerSizes()
    qformer_init: str | None = None
    """Hugging Face BERT that the Q-Former starts from (hub name or local folder); null: random weights."""
    init_mismatch: Literal["refuse", "reinitialise"] = "refuse"
    """Treatment of tensors of `qformer_init` or `init_from` that do not fit."""


class LossWeightSettings(Settings):
    """Factors of the loss terms; one of 0 has no gradient and is only reported.

    The names of a bridge's own terms are keys too.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Weight] = Field(init=False)

    itc: Weight = 1.0
    itm: Weight = 1.0
    itg: Weight = 1.0
    lm: Weight = 1.0
    diversity: Weight = 0.0
    """Weight of the mean squared cosine between an image's query outputs; 0.1 keeps queries from becoming equal."""
    is_learned: bool = False
    """Also learn a factor of each term (uncertainty weighting)."""

    def by_name(self) -> dict[str, float]:
        """Factor of each term that one is set for."""
        return self.model_dump(exclude={"is_learned"})


class OptimSettings(Settings):
    """AdamW with warm-up and cosine (BLIP-2, section 3.4)."""

    learning_rate: float = Field(default=1e-4, gt=0)
    min_learning_rate: float = Field(default=1e-5, ge=0)
    warmup_steps: int = Field(default=2000, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: Decay | None = None
    """Save an exponential moving average of the weights in their place, e.g. 0.999; null: the weights themselves."""
    loss_weights: LossWeightSettings = LossWeightSettings()
