"""Storage types of the frozen encoder's tokens: fp16, bf16, or int8 with one scale a token.

Dimensions: T frames, P tokens, V encoder width; `...` any leading dimensions.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenDtype = Literal["fp16", "bf16", "int8"]

RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),  # NumPy has no bfloat16: the upper 16 bits of a float32
    "int8": np.dtype(np.uint8),
}
_SCALE_BYTES = 4
_MAX_INT8 = 127


def raw_width(width: int, dtype: TokenDtype) -> int:
    """Number of stored items of a token of `width` values; int8 has its float32 scale after the values."""
    return width + _SCALE_BYTES if dtype == "int8" else width


def encode_tokens(tokens: NDArray[np.float32], dtype: TokenDtype) -> NDArray[Any]:
    """Turn tokens [..., V] into their stored form [..., `raw_width`].

    fp16 rounds to 11 significant bits, bf16 to 8; int8 is off by at most half of max|token| / 127.

    Raises:
        ValueError: If a value is not finite, or too large for fp16.
    """
    if not np.isfinite(tokens).all():
        raise ValueError("the encoder's output is not finite; run it in fp32, or check its weights")
    if dtype == "fp16":
        if np.abs(tokens).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(f"a token reaches {np.abs(tokens).max():.0f}, more than fp16 holds; store bf16")
        return tokens.astype(np.float16)
    if dtype == "bf16":
        bits = np.ascontiguousarray(tokens).view(np.uint32)
        # Round to nearest, ties to even, as the hardware does.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    scale = np.abs(tokens).max(axis=-1, keepdims=True).astype(np.float32) / _MAX_INT8
    steps = np.rint(tokens / np.where(scale > 0, scale, 1)).astype(np.int8)
    return np.concatenate([steps.view(np.uint8), np.ascontiguousarray(scale).view(np.uint8)], axis=-1)


def decode_tokens(raw: NDArray[Any], dtype: TokenDtype) -> NDArray[Any]:
    """Undo `encode_tokens`: float16 for fp16, float32 for the others."""
    if dtype == "fp16":
        return raw
    if dtype == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    scale = np.ascontiguousarray(raw[..., -_SCALE_BYTES:]).view(np.float32)
    return np.ascontiguousarray(raw[..., :-_SCALE_BYTES]).view(np.int8) * scale
