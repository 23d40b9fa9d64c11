"""Settings of the model and of its optimizer."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from jobs.settings.data import Settings
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig
from qformer.config import LoraConfig, QFormerConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class QFormerSettings(Settings):
    """The trainable bridge; widths of encoder and language model adapt by themselves."""

    hidden_size: int = Field(default=768, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=12, ge=1)
    intermediate_size: int = Field(default=3072, ge=1)
    num_queries: int = Field(default=32, ge=1)
    cross_attention_frequency: int = Field(default=2, ge=1)
    embed_dim: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    max_positions: int = Field(default=512, ge=1)
    """Text positions; as many as `model.qformer_init` has."""
    vision_norm_eps: float = Field(default=1e-5, gt=0)
    """Of the norm on the encoder's tokens; 1e-6 makes `qformer export` exact, 1e-5 is LAVIS'."""
    activation_checkpointing: bool = False
    """Less memory for about a third more work: layers are computed again in the backward pass."""

    @model_validator(mode="after")
    def _check(self) -> "QFormerSettings":
        QFormerConfig(encoder_width=1, **self.model_dump())
        return self


class AudioBranchSettings(Settings):
    """The branch of a stage-2 bridge that reads what `model.audio` hears."""

    num_queries: int = Field(default=8, ge=1)
    num_layers: int = Field(default=2, ge=1)
    max_segments: int = Field(default=8, ge=1)
    """Segment positions that are trained; more segments stretch them."""
    is_joint: bool = False
    """Read sound with the frames, in the second Q-Former of a cascaded bridge, one segment a frame; the encoder must be
    as wide as the Q-Former."""
    trains_alone: bool = False
    """Video-LLaMA's way: in this run the branch alone is trained, and read; later runs and answers read both."""


class ModelSettings(Settings):
    """Frozen backbones and the bridge between them."""

    vision: str
    """Vision encoder: timm name, Hugging Face name (owner/model), or local folder of either's files."""
    vision_pretrained: bool = True
    """false: random weights (for dry runs; a random encoder sees little)."""
    vision_layer: int = -2
    """Which block's output the Q-Former reads; -2 is the paper's second-to-last."""
    vision_image_size: int | None = Field(default=None, ge=1)
    """Side of the encoder's square input in pixels, its positions interpolated; null: the encoder's own."""
    audio: str | None = None
    """Audio encoder for stage 2: Hugging Face name or local folder (AST, Whisper, wav2vec 2.0); "features" for the
    vectors that `data.features` keeps, whatever made them; null: no sound."""
    audio_pretrained: bool = True
    audio_branch: AudioBranchSettings = AudioBranchSettings()
    language: str | None = None
    """Hugging Face language model for stage 2, decoder-only or T5: hub name or local folder."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of the Q-Former: hub name, local folder, or "corpus" to learn WordPiece from the captions. A
    Q-Former that reads text takes the one of `init_from` where that has one."""
    max_text_tokens: int = Field(default=32, ge=4)
    """Longest caption and longest prompt; longer ones lose their last words, and are counted."""
    prompt: str = ""
    """Text put before every caption in stage 2, not counted in the loss; rows with an instruction bring their own."""
    qformer_reads_prompt: bool = False
    """Stage 2: give prompt or instruction to the Q-Former as well as to the language model (InstructBLIP)."""
    lavis_reduction: bool = False
    """Stage 1: reduce over workers as LAVIS does: gathered features without gradient, ITG over own tokens."""
    freeze_qformer: bool = False
    """Stage 2: train the projection to the language model alone (MiniGPT-4); needs `init_from`."""
    lora: LoraConfig | None = None
    """Stage 2: also train low-rank updates of the language model; null: it stays as it is."""
    bridge: Annotated[BridgeConfig, Field(discriminator="kind")] = IMAGE_BRIDGE
    """How the frames of a clip become what stage 2 reads, and with which weights; the other keys go with `kind`. An
    image is a clip of one frame."""
    qformer: QFormerSettings = QFormerSettings()
    qformer_init: str | None = None
    """Hugging Face BERT that the Q-Former starts from (hub name or local folder); null: random weights."""
    init_mismatch: Literal["refuse", "reinitialise"] = "refuse"
    """What becomes of tensors that do not fit on starting from `qformer_init` or `init_from`."""


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
    """Of the mean squared cosine between an image's query outputs: 0.1 keeps queries from collapsing into one."""
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
