"""Requests of the HTTP interface as pydantic models: those of OpenAI's clients and those of the task endpoints.

A field that is unknown, or has no effect here, is an error that names it: a client that sends tools learns that there
are none. Neutral values of OpenAI's fields (null, penalties of 0) are accepted, for clients that always send them.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipelines.serving.contract.errors import ApiError

ModelT = TypeVar("ModelT", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of all requests: frozen, no unknown fields, no conversions ("16" is not a number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Url(StrictModel):
    """A data: URL (`data:image/jpeg;base64,…`), or an https: URL of a host that the server fetches from."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    """Without effect: the encoder sets the image size."""


class TextPart(StrictModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str

    @field_validator("text")
    @classmethod
    def _text(cls, value: str) -> str:
        return _not_blank(value)


class ImagePart(StrictModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(StrictModel):
    """A video; frames are sampled from it as in training."""

    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(StrictModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    """Without effect."""
    refusal: None = None


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None

    @field_validator("include_obfuscation", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        return _true_or_false(value)


class SamplingRequest(StrictModel):
    """Fields that control text generation."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    """A name from /v1/models; default: the server's first model."""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Newer name of `max_tokens`."""
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    """0 selects the likeliest token; default: the server's setting (greedy unless changed)."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    """The answer ends before the first of these (at most 4)."""

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 4 or not all(0 < len(text) <= 256 for text in texts):
            raise ValueError("give at most 4 texts of 1 to 256 characters")
        return value


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    """Without effect."""
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    """Without effect."""
    safety_identifier: str | None = None
    """Without effect."""

    @field_validator("n", "frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """Reject booleans, which equal 0 and 1 in Python, and accept 0.0, which equals 0 in JSON."""
        if isinstance(value, bool):
            raise ValueError("give a number")
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("logprobs", "store", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        return _true_or_false(value)


class EmbeddingRequest(StrictModel):
    """POST /v1/embeddings: texts, as OpenAI's clients send them, or chat parts for pictures and videos."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    input: str | list[str] | list[Part] = Field(min_length=1)
    """Inputs; each gets its own entry in the answer, in order."""
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "queries"] = "mean"
    """Pooling of pictures and videos. mean: one normalised vector, the mean over the queries. queries: one vector per
    query; the largest product with a text's vector is the similarity of training (ITC)."""
    dimensions: None = None
    user: str | None = None
    """Without effect."""


class TaskMedia(StrictModel):
    """A picture or a video: base64, a data: URL, or an https: URL of a host that the server fetches from."""

    image: str | None = Field(default=None, min_length=1)
    video: str | None = Field(default=None, min_length=1)


class CaptionRequest(TaskMedia, SamplingRequest):
    """POST /v1/caption as JSON; the endpoint also takes the raw bytes of a picture or video."""


class VqaRequest(TaskMedia, SamplingRequest):
    """POST /v1/vqa: one question, one answer."""

    question: str = Field(min_length=1)

    @field_validator("question")
    @classmethod
    def _question(cls, value: str) -> str:
        return _not_blank(value)


class MatchRequest(TaskMedia):
    """POST /v1/match: how well texts fit a picture or a video."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    texts: list[str] = Field(min_length=1)

    @field_validator("texts")
    @classmethod
    def _texts(cls, value: list[str]) -> list[str]:
        return [_not_blank(text) for text in value]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("give it some text, or leave it out")
    return text


def _true_or_false(value: Any) -> Any:
    """Return `value`; reject 0 and 1, which equal booleans in Python."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("give true or false")
    return value


def parse_request(model: type[ModelT], value: Any) -> ModelT:
    """Validate a JSON value as a request.

    Raises:
        ApiError: 400 with the name of an invalid field.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # Of the members of a union, report the error that lies deepest: the client most likely meant that one.
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = max(errors, key=lambda one: len(one["loc"]))
        param = _place(first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"{param!r} is not a field of this endpoint, or has no effect here; leave it out"
        elif first["type"] == "missing":
            message = f"{param!r} is missing"
        else:
            message = f"{param!r}: {first['msg'][0].lower()}{first['msg'][1:300]}"
        raise ApiError(400, "invalid_request", message[:500], param=param) from None


_UNION_TAGS = {"text", "image_url", "video_url", "str", "TextPart", "ImagePart", "VideoPart"}


def _place(location: tuple[int | str, ...]) -> str:
    """Format a location as messages[0].content[1].image_url.url, without the union tags that pydantic adds."""
    place, previous = "", None
    for part in location:
        is_tag = isinstance(part, str) and (part.startswith("list[") or part == "str")
        is_tag |= isinstance(previous, int) and part in _UNION_TAGS
        if not is_tag:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)[:100]
        previous = part
    return place
