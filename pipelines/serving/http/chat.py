"""From a request's messages to what the models read.

Template: a turn's images and videos come first, as soft prompts, then its text; all texts are joined by single spaces,
as prompt and answer are in training; a system message is the beginning of the first text. One image and one instruction
are thus what `Captioner.answer` makes of them. A last turn of images and videos alone gets the prompt of the adapter's
training. The Q-Former of an instruction-aware adapter reads the text of the last turn beside every image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.data.schema import IMAGE, VIDEO
from pipelines.serving.contract.config import RequestLimits
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.contract.schemas import ImagePart, Message, Sampled, TextPart, VideoPart
from pipelines.serving.contract.uploads import Upload, parse_reference
from pipelines.serving.contract.wire import AnswerSettings
from qformer.config import GenerationSettings

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """One image or video and the field that it came in."""

    upload: Upload
    param: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Media and texts in the order in which the language model reads them."""

    segments: tuple[Medium | str, ...]
    instruction: str
    """What an instruction-aware Q-Former reads."""

    @property
    def media(self) -> list[Medium]:
        """Images and videos in order."""
        return [segment for segment in self.segments if isinstance(segment, Medium)]


def single_turn(upload: Upload, text: str, param: str | None) -> Conversation:
    """One image or video and one instruction."""
    return Conversation(segments=(Medium(upload=upload, param=param), text), instruction=text)


def read_conversation(messages: Sequence[Message], prompt: str, limits: RequestLimits) -> Conversation:
    """Take a request's messages apart.

    Args:
        messages: As they came in.
        prompt: The adapter's, for a last turn of images and videos alone.
        limits: Of one request.

    Raises:
        ApiError: 400 or 415 for what cannot be answered, with the field that is wrong.
    """
    _require_answerable(messages, limits)
    turns = [(*_turn(message, f"messages[{place}]"), message.role) for place, message in enumerate(messages)]
    if not any(turns[-1][:2]):
        message = "the last message holds neither text nor image nor video; ask something"
        raise ApiError(400, "invalid_request", message, param=f"messages[{len(messages) - 1}].content")
    pending = " ".join(text for _, text, role in turns if role in _SYSTEM and text)
    segments: list[Medium | str] = []
    has_text = False  # besides the system's, which waits for the first turn's media
    for place, (media, text, role) in enumerate(turns):
        if role in _SYSTEM:
            continue
        if media and has_text:
            segments.append(pending)
            pending, has_text = "", False
        segments += media
        if place == len(turns) - 1:
            text = text or prompt
        pending, has_text = f"{pending} {text}".strip(), has_text or bool(text)
    return Conversation(segments=(*segments, pending), instruction=turns[-1][1] or prompt)


def answer_settings(request: Sampled, default: GenerationSettings, limits: RequestLimits) -> AnswerSettings:
    """How to generate, by the request where it says so and else by the server's settings.

    Raises:
        ApiError: 400 when two fields contradict each other, or more tokens are wanted than allowed.
    """
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        message = "max_tokens and max_completion_tokens differ; give one of them"
        raise ApiError(400, "invalid_request", message, param="max_completion_tokens")
    wanted = request.max_completion_tokens or request.max_tokens
    if wanted is not None and wanted > limits.max_new_tokens:
        message = f"{wanted} tokens exceed this server's limit of {limits.max_new_tokens}; ask for fewer"
        raise ApiError(400, "invalid_request", message, param="max_tokens")
    is_sampling = default.top_p is not None
    temperature = request.temperature
    if temperature is None:
        # As OpenAI's clients expect: who gives top_p alone wants to sample.
        temperature = default.temperature if is_sampling else 1.0 if request.top_p is not None else 0.0
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return AnswerSettings(
        max_new_tokens=wanted or min(default.max_new_tokens, limits.max_new_tokens),
        temperature=temperature,
        top_p=request.top_p or default.top_p or 1.0,
        repetition_penalty=default.repetition_penalty,
        seed=default.seed if request.seed is None else request.seed,
        stop=stop,
    )


def _turn(message: Message, place: str) -> tuple[list[Medium], str]:
    if isinstance(message.content, str):
        return [], message.content.strip()
    if not message.content:
        raise ApiError(400, "invalid_request", f"{place}.content is empty; give it a part", param=f"{place}.content")
    media, texts = [], []
    for number, part in enumerate(message.content):
        param = f"{place}.content[{number}]"
        if isinstance(part, TextPart):
            texts.append(part.text.strip())
            continue
        if message.role != "user":
            error = f"{param}: only the user's messages may hold images and videos"
            raise ApiError(400, "invalid_request", error, param=param)
        media.append(_medium(part, param))
    return media, " ".join(text for text in texts if text)


def _medium(part: ImagePart | VideoPart, param: str) -> Medium:
    if isinstance(part, ImagePart):
        param += ".image_url.url"
        return Medium(upload=parse_reference(IMAGE, part.image_url.url, param), param=param)
    param += ".video_url.url"
    return Medium(upload=parse_reference(VIDEO, part.video_url.url, param), param=param)


def _require_answerable(messages: Sequence[Message], limits: RequestLimits) -> None:
    """Count before anything is decoded."""
    if len(messages) > limits.max_messages:
        message = f"{len(messages)} messages exceed the limit of {limits.max_messages}; drop the oldest"
        raise ApiError(400, "too_many_messages", message, param="messages")
    if messages[-1].role != "user":
        message = f"the last message is of the {messages[-1].role}; it must be the user's"
        raise ApiError(400, "invalid_request", message, param=f"messages[{len(messages) - 1}].role")
    parts = [part for message in messages if not isinstance(message.content, str) for part in message.content]
    if (count := sum(not isinstance(part, TextPart) for part in parts)) > limits.max_media:
        error = f"{count} images and videos exceed the limit of {limits.max_media}; send fewer"
        raise ApiError(400, "too_many_media", error, param="messages")
    texts = [message.content for message in messages if isinstance(message.content, str)]
    require_short([*texts, *(part.text for part in parts if isinstance(part, TextPart))], limits, "messages")


def require_short(texts: Sequence[str], limits: RequestLimits, param: str) -> None:
    """Refuse what would keep the tokenizer busy for long.

    Raises:
        ApiError: 400.
    """
    if (count := sum(map(len, texts))) > limits.max_text_characters:
        message = f"{count} characters of text exceed the limit of {limits.max_text_characters}; shorten them"
        raise ApiError(400, "context_length_exceeded", message, param=param)
