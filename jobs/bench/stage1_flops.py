"""Floating-point operations of one stage-1 step of ours, counted from its shapes.

A product of [M, K] and [K, N] counts 2 M K N, and so does every product of attention; norms, softmax, GELU and dropout
count nothing. The backward counts twice the forward (one product for the input's gradient, one for the weight's), what
it computes again (the GELU's second product is not) counts nothing. Rows are those that `Stage1` computes: real text
tokens alone, images' keys and values once, of the last layer only what is read.

Dimensions: B batch, P image tokens, Q queries, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qformer.config import QFormerConfig


@dataclass(frozen=True, slots=True)
class _Pass:
    """Row counts of one pass through the layers."""

    rows: int
    """Packed rows with keys and values."""
    read_rows: int
    """Rows that the last layer computes fully."""
    query_rows: int
    """Rows that cross-attend."""
    attended: int
    """Pairs of attending and attended rows, padding included, as in the kernel."""
    last_attended: int
    """Pairs of attending and attended rows in the last layer."""


def step_flops(config: QFormerConfig, lengths: Sequence[int], negative_lengths: Sequence[int], tokens: int) -> int:
    """Forward and backward of one step of images with one text each, in one process.

    Args:
        config: Shapes of the Q-Former.
        lengths: Token counts of the texts, [CLS] and [SEP] included.
        negative_lengths: Token counts of the negative texts in ITM.
        tokens: Number of image tokens P.
    """
    batch, queries, longest, total = len(lengths), config.num_queries, max(lengths), sum(lengths)
    pair_rows = 3 * batch * queries
    joint_rows = pair_rows + 2 * total + sum(negative_lengths)
    decoded = total - batch  # [SEP] predicts nothing
    row = queries + longest
    passes = (
        _Pass(*[batch * queries] * 3, *[batch * queries**2] * 2),
        _Pass(total, batch, 0, batch * longest**2, batch * longest),
        _Pass(joint_rows, pair_rows, pair_rows, 3 * batch * row**2, 3 * batch * queries * row),
        _Pass(decoded, decoded, 0, *[batch * (longest - 1) * (row - 1)] * 2),
    )
    crossing = sum(config.has_cross_attention(layer) for layer in range(config.num_layers))
    hidden, width = config.hidden_size, config.encoder_width
    forward = sum(_pass_flops(config, one, tokens, crossing) for one in passes)
    forward += crossing * batch * tokens * 4 * width * hidden  # the images' keys and values
    forward += (batch * queries + batch) * 2 * hidden * config.embed_dim + pair_rows * 4 * hidden
    forward += decoded * (2 * hidden**2 + 2 * hidden * config.vocab_size)
    return 3 * forward


def _pass_flops(config: QFormerConfig, one: _Pass, tokens: int, crossing: int) -> int:
    hidden, layers = config.hidden_size, config.num_layers
    key_value, rest = 4 * hidden**2, 4 * hidden**2 + 4 * hidden * config.intermediate_size
    linear = layers * one.rows * key_value + ((layers - 1) * one.rows + one.read_rows) * rest
    attention = 4 * hidden * ((layers - 1) * one.attended + one.last_attended)
    return linear + attention + crossing * one.query_rows * (4 * hidden**2 + 4 * hidden * tokens)
