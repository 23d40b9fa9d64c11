"""Settings of `qformer import` and `qformer export`."""

from pydantic import Field

from jobs.settings.data import Settings
from jobs.settings.specs import Language, Vision


class ImportSettings(Settings):
    """`qformer import`: convert a LAVIS file or a Hugging Face folder to a checkpoint."""

    source: str
    """LAVIS file (.pth or .safetensors), or local folder of Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval or InstructBlipForConditionalGeneration with its processor."""
    output: str
    """New local folder; `checkpoint=` of the other jobs takes it."""
    vision: Vision | None = None
    """Encoder for a LAVIS file, which has none; a Hugging Face folder has its own."""
    language: Language | None = None
    """Language model for a LAVIS stage-2 file; a Hugging Face folder has its own."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of a LAVIS stage-1 file."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a LAVIS Q-Former, which its tensors do not show; null: 64 channels a head, as BERT."""
    prompt: str = ""
    """Text before every caption, as in the training of the imported model."""
    num_frames: int = Field(default=8, ge=1)
    """Frames that later jobs sample from a video."""
    max_text_tokens: int = Field(default=32, ge=4)
    allow_fresh: bool = False
    """Initialise tensors that the source lacks; false: refuse it."""
    allow_unexpected: bool = False
    """Leave out tensors that have no place here; false: refuse the source."""


class ExportSettings(Settings):
    """`qformer export`: write a checkpoint as a folder for stock transformers."""

    checkpoint: str
    """Run folder (its newest checkpoint) or one checkpoint folder."""
    output: str
    """New local folder."""
