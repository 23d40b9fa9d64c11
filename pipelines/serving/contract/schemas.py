"""Requests of the HTTP interface as pydantic models: what OpenAI's clients send, and our task endpoints.

A field that is unknown, or known but without effect here, is refused by name: a client that asks for tools and gets
none should know. Neutral values of OpenAI's fields (null, 0 penalties) are let through, for clients that always send
them.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipelines.serving.contract.errors import ApiError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Strict(BaseModel):
    """Frozen, without unknown fields, and without conversions: "16" is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Url(Strict):
    """A data: URL (`data:image/jpeg;base64,…`), or an https: URL of a host that the server fetches from."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    """Without effect: the size is the encoder's."""


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str

    @field_validator("text")
    @classmethod
    def _text(cls, value: str) -> str:
        return _not_blank(value)


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(Strict):
    """A video; frames are sampled from it as in training."""

    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    """Without effect."""
    refusal: None = None


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None

    @field_validator("include_obfuscation", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        return _true_or_false(value)


class Sampled(Strict):
    """How the answer's text is generated."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    """A name from /v1/models; left out, the server's first."""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`."""
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    """0 takes the likeliest token; left out, as the server is set up (greedy by default)."""
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


class ChatRequest(Sampled):
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
        """To Python, false equals 0; to JSON, 0.0 does."""
        if isinstance(value, bool):
            raise ValueError("give a number")
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("logprobs", "store", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        return _true_or_false(value)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings: texts as OpenAI's clients send them, or parts of a chat message for pictures and videos."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    input: str | list[str] | list[Part] = Field(min_length=1)
    """Each text, picture and video gets an entry of its own, in order."""
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "queries"] = "mean"
    """Of pictures and videos. mean: one normalised vector, the mean of the queries'. queries: all of them, whose
    largest product with a text's vector is the similarity that the model was trained on."""
    dimensions: None = None
    user: str | None = None
    """Without effect."""


class TaskMedia(Strict):
    """A picture or a video: base64, a data: URL, or an https: URL of a host that the server fetches from."""

    image: str | None = Field(default=None, min_length=1)
    video: str | None = Field(default=None, min_length=1)


class CaptionRequest(TaskMedia, Sampled):
    """POST /v1/caption as JSON; the raw bytes of a picture or video do, too."""


class VqaRequest(TaskMedia, Sampled):
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
    """`value`, unless it is a number that Python holds for one of the two."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("give true or false")
    return value


def validated(model: type[ModelT], value: Any) -> ModelT:
    """`value` as a request.

    Raises:
        ApiError: 400 that names a field that is wrong.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # Where several shapes are allowed, the one that fits furthest was meant.
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
    """messages[0].content[1].image_url.url; pydantic adds the member of a union that it tried."""
    place, previous = "", None
    for part in location:
        is_tag = isinstance(part, str) and (part.startswith("list[") or part == "str")
        is_tag |= isinstance(previous, int) and part in _UNION_TAGS
        if not is_tag:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)[:100]
        previous = part
    return place
