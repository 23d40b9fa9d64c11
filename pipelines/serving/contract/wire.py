"""Values that deployments exchange: plain types, so that no process loads a library only to read them.

F frames, C channels, Y/X pixels, N soft-prompt rows, L language-model width, E embedding width.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedMedia:
    """One decoded image or video."""

    pixels: NDArray[np.uint8]
    """[F, C, Y, X]; F is 1 for an image."""
    frame_valid: NDArray[np.bool_]
    """[F], False at padding frames, which repeat others."""
    waveforms: NDArray[np.float32] | None = None
    """[segments, samples] of sound; None where the adapter reads no sound."""
    audio_valid: NDArray[np.bool_] | None = None
    """[segments], False where there is no sound."""
    size_bytes: int
    """Size of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """Generation settings of one answer; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """Input of the language model: texts and soft prompts [N, L], in order."""

    segments: tuple[str | NDArray[np.float32], ...]
    settings: AnswerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of a generated answer; the last one has a finish reason."""

    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    """Input rows of the language model: soft prompts and text tokens."""
    completion_tokens: int
    """Tokens generated so far, including the one that ended the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchScore:
    """Score of one text against one image or video."""

    probability: float
    """Probability of the matching head (ITM), between 0 and 1."""
    similarity: float
    """Similarity of the embeddings (ITC): the largest product over the queries, between -1 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEmbeddings:
    """Embeddings of texts."""

    vectors: NDArray[np.float32]
    """[texts, E], normalised."""
    num_tokens: int
    """Text tokens that the Q-Former read."""
