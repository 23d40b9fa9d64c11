"""What the deployments tell each other: plain values, so that no process loads a library only to read them.

F frames, C channels, Y/X pixels, N soft-prompt rows, L language-model width, E embedding width.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One image or video as the models take it."""

    pixels: NDArray[np.uint8]
    """[F, C, Y, X]; F is 1 for an image."""
    frame_valid: NDArray[np.bool_]
    """[F], False at frames that only repeat others."""
    waveforms: NDArray[np.float32] | None = None
    """[segments, samples] of sound; None where the adapter hears none."""
    audio_valid: NDArray[np.bool_] | None = None
    """[segments], False where there is no sound."""
    size_bytes: int
    """Of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """How one answer is generated; greedy at temperature 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """What the language model reads: texts and soft prompts [N, L], in order."""

    segments: tuple[str | NDArray[np.float32], ...]
    settings: AnswerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What an answer grew by; the last one says why it ended."""

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    """Rows that the language model read: soft prompts and text tokens."""
    completion_tokens: int
    """Generated so far, with the one that ended the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """How one text fits one image or video."""

    probability: float
    """Of the matching head (ITM), between 0 and 1."""
    similarity: float
    """Of the embeddings (ITC): the largest product over the queries, between -1 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEmbeddings:
    """Embeddings of texts."""

    vectors: NDArray[np.float32]
    """[texts, E], normalised."""
    num_tokens: int
    """That the Q-Former read."""
