"""Requests to the engine, and its outcomes.

Dimensions: S rows of input, L language-model width.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from qformer.config import GenerationSettings
from qformer.errors import UserError

FinishReason = Literal["stop", "length"]
""""stop": an end id or a stop string was generated. "length": `max_new_tokens` were generated."""

MAX_STOPS = 16
"""Largest number of stop strings of one request."""
MAX_STOP_CHARACTERS = 256
"""Largest length of a stop string; up to this much text may be delayed."""


class RequestError(ValueError):
    """A request that the engine cannot run; the message says what to change."""


class TooLongError(RequestError):
    """A prompt and the requested answer are too long."""

    def __init__(self, message: str, max_tokens: int) -> None:
        super().__init__(message)
        self.max_tokens = max_tokens
        """Largest number of tokens that fit."""


class QueueFullError(RuntimeError):
    """The largest allowed number of requests wait; try again later."""


class GenerationFailedError(RuntimeError):
    """The model failed on this request; the engine continues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSettings:
    """How one request's text is generated: greedy unless `temperature` is above 0.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most likely token."""
    top_p: float = 1.0
    """Probability mass of the smallest set of tokens to sample from."""
    repetition_penalty: float = 1.0
    seed: int = 0
    """Seed of the sampling; other requests in the batch have no effect."""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0 (0: greedy)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive (1: none)")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop):
            raise ValueError(
                f"stop must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters, got "
                f"{len(self.stop)} of {sorted({len(text) for text in self.stop})} characters"
            )

    @classmethod
    def of(cls, settings: GenerationSettings) -> "RequestSettings":
        """The settings for the same generation as `LanguageModel.generate`.

        Raises:
            UserError: If they use beam search, which the engine does not support.
        """
        if settings.num_beams > 1:
            raise UserError(
                f"generation.num_beams={settings.num_beams}: the engine generates greedily or samples; use num_beams=1 "
                "here, or `qformer evaluate`, which supports beam search"
            )
        return cls(
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0 if settings.top_p is None else settings.temperature,
            top_p=1.0 if settings.top_p is None else settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EngineRequest:
    """One text to generate."""

    inputs_SL: Tensor
    """Soft prompts and embedded text in order; see `inputs`."""
    settings: RequestSettings = field(default_factory=RequestSettings)
    is_streamed: bool = True
    """Whether text is delivered as it is generated; False gives one delta at the end, which costs less."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one request so far."""

    prompt_tokens: int
    """Number of input rows: soft prompts and text tokens."""
    completion_tokens: int
    """Number of generated tokens, including the end token."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a request. Joined, the deltas' texts equal the result of `LanguageModel.generate`."""

    text: str
    """Whole characters, without any part of a stop string or space that may be trailing."""
    token_ids: tuple[int, ...]
    """Tokens since the last delta; their text may be in a later one."""
    finish_reason: FinishReason | None
    """Reason of the end; None except in the last delta."""
    usage: Usage

    def followed_by(self, later: "Delta") -> "Delta":
        """Join this delta with the next one."""
        return replace(later, text=self.text + later.text, token_ids=self.token_ids + later.token_ids)
