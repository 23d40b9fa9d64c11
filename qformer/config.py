"""Shapes of the Q-Former."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig:
    """A BERT-shaped Q-Former (BLIP-2, arXiv:2301.12597, section 3.1).

    The defaults are the paper's: BERT-base, 32 queries, cross-attention in every second layer.

    Raises:
        ValueError: If the heads do not divide the width or a size is not positive.
    """

    encoder_width: int
    """Width of the frozen vision encoder's tokens (keys and values of the cross-attention)."""
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    num_queries: int = 32
    cross_attention_frequency: int = 2
    """Layers i with i % cross_attention_frequency == 0 cross-attend."""
    vocab_size: int = 0
    """Text vocabulary including [DEC], the last id; 0 builds no text branch (stage 2)."""
    has_lm_head: bool = True
    """Whether a text branch can generate (stage 1); an instruction-aware stage 2 only reads."""
    max_positions: int = 512
    """Trained absolute text positions; queries have none."""
    embed_dim: int = 256
    """Width of the shared ITC space."""
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    vision_norm_eps: float = 1e-5
    """Of the trained layer norm on the encoder's tokens: 1e-5 in LAVIS, 1e-6 in Hugging Face's BLIP-2."""
    activation_checkpointing: bool = False
    """Keep only each layer's input in training and compute the layer again in the backward pass: less memory for about
    a third more work."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        sizes = (
            self.encoder_width,
            self.hidden_size,
            self.num_layers,
            self.num_heads,
            self.intermediate_size,
        )
        if min(*sizes, self.num_queries, self.cross_attention_frequency, self.max_positions, self.embed_dim) < 1:
            raise ValueError(f"all Q-Former sizes must be positive, got {self}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def has_text_branch(self) -> bool:
        """Whether word embeddings and text feed-forwards exist."""
        return self.vocab_size > 0

    def has_cross_attention(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) cross-attends to the image."""
        return layer % self.cross_attention_frequency == 0
