"""What is built and how it generates: frozen models, shapes of the Q-Former, updates, generation. Free of torch."""

from dataclasses import KW_ONLY, dataclass, fields

CACHED_AUDIO = "features"
"""Name of an audio encoder that stands for the vectors in a feature cache, whatever made them (ImageBind)."""


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """A frozen vision encoder, and the layer of it that the bridge reads.

    Raises:
        ValueError: If the name is empty or the size not positive.
    """

    name: str
    """timm name, Hugging Face name (owner/model), or local folder of either's files."""
    _: KW_ONLY
    pretrained: bool = True
    """false: random weights of a fixed seed (for dry runs)."""
    layer: int = -2
    """Block whose output the Q-Former reads; -2 is the paper's second-to-last."""
    image_size: int | None = None
    """Side of the square input in pixels, to which the encoder's positions are interpolated; null: the encoder's own.
    """

    def __post_init__(self) -> None:
        _require_name(self.name)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1; leave it out for the encoder's own")


@dataclass(frozen=True, slots=True)
class AudioSpec:
    """A frozen audio encoder.

    Raises:
        ValueError: If the name is empty.
    """

    name: str
    """Hugging Face name or local folder (AST, Whisper, wav2vec 2.0); "features": the vectors in the feature cache."""
    _: KW_ONLY
    pretrained: bool = True
    """false: random weights of a fixed seed (for dry runs)."""

    def __post_init__(self) -> None:
        _require_name(self.name)

    @property
    def is_cached(self) -> bool:
        """Whether only a feature cache holds its vectors: there is no encoder to load."""
        return self.name == CACHED_AUDIO


@dataclass(frozen=True, slots=True)
class LanguageSpec:
    """A frozen language model, decoder-only or encoder-decoder (T5).

    Raises:
        ValueError: If the name is empty.
    """

    name: str
    """Hugging Face name or local folder."""

    def __post_init__(self) -> None:
        _require_name(self.name)


def _require_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be a hub name or a local folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerSizes:
    """Sizes of a BERT-shaped Q-Former that a user chooses (BLIP-2, arXiv:2301.12597, section 3.1).

    The defaults are the paper's: BERT-base, 32 queries, cross-attention in every second layer.

    Raises:
        ValueError: If the heads do not divide the width or a size is out of its range.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    num_queries: int = 32
    cross_attention_frequency: int = 2
    """Layers i with i % cross_attention_frequency == 0 cross-attend."""
    max_positions: int = 512
    """Trained absolute text positions, as many as the BERT that the Q-Former starts from; queries have none."""
    embed_dim: int = 256
    """Width of the shared ITC space."""
    dropout: float = 0.1
    vision_norm_eps: float = 1e-5
    """Epsilon of the trained layer norm on the encoder's tokens: 1e-5 in LAVIS; 1e-6 in Hugging Face's BLIP-2, which
    makes `qformer export` exact."""
    activation_checkpointing: bool = False
    """Keep only each layer's input in training and compute the layer again in the backward pass: less memory for about
    a third more work."""

    def __post_init__(self) -> None:
        for size in fields(self):
            value, least = getattr(self, size.name), 0 if size.name == "vocab_size" else 1
            if size.type is int and value < least:
                raise ValueError(f"{size.name}={value} must be at least {least}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not self.vision_norm_eps > 0:
            raise ValueError(f"vision_norm_eps={self.vision_norm_eps} must be above 0")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig(QFormerSizes):
    """The sizes with what follows from the frozen models and the stage.

    Raises:
        ValueError: If a size is out of its range.
    """

    encoder_width: int
    """Width of the frozen vision encoder's tokens (keys and values of the cross-attention)."""
    vocab_size: int = 0
    """Text vocabulary including [DEC], the last id; 0 builds no text branch (stage 2)."""
    has_lm_head: bool = True
    """Whether a text branch can generate (stage 1); an instruction-aware stage 2 only reads."""
    layer_norm_eps: float = 1e-12

    @classmethod
    def of(cls, sizes: QFormerSizes, *, encoder_width: int, vocab_size: int, has_lm_head: bool) -> "QFormerConfig":
        """Complete the sizes that a user has chosen."""
        values = {one.name: getattr(sizes, one.name) for one in fields(QFormerSizes)}
        return cls(encoder_width=encoder_width, vocab_size=vocab_size, has_lm_head=has_lm_head, **values)

    @property
    def has_text_branch(self) -> bool:
        """Whether word embeddings and text feed-forwards exist."""
        return self.vocab_size > 0

    def has_cross_attention(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) cross-attends to the image."""
        return layer % self.cross_attention_frequency == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Size and place of a language model's low-rank updates (LoRA, arXiv:2106.09685, section 4.1).

    Raises:
        ValueError: If a value is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj", "c_attn", "q", "v")
    """Last part of the names of the layers to update; query and value of OPT, Llama, Qwen, GPT-2 and T5."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"LoRA needs rank >= 1, alpha > 0 and dropout in [0, 1), got rank={self.rank}, alpha={self.alpha}, "
                f"dropout={self.dropout}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How text is generated: greedy by default, beam search with `num_beams` > 1, nucleus sampling with `top_p`.

    Raises:
        ValueError: If a value is out of its range, or would have no effect beside the others.
    """

    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    """Exponent of the length that beam scores are divided by; below 0 favours short texts."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose probabilities sum to this; null does not sample."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    repetition_penalty: float = 1.0
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and num_beams={self.num_beams} must be at least 1; raise them"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; leave it out for greedy or beam search")
        if self.top_p is not None and self.num_beams > 1:
            raise ValueError(f"top_p={self.top_p} samples, num_beams={self.num_beams} searches; set one of them")
        if self.temperature <= 0 or self.repetition_penalty <= 0:
            raise ValueError(
                f"temperature={self.temperature} and repetition_penalty={self.repetition_penalty} must be positive"
            )
        if self.temperature != 1.0 and self.top_p is None:
            raise ValueError(f"temperature={self.temperature} changes sampling alone; set top_p too (1.0: all tokens)")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise ValueError(f"length_penalty={self.length_penalty} ranks beams; set num_beams above 1 too")
