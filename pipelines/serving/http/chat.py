"""The chat template: from the messages of a request to the input of the models.

The images and videos of a turn come first, as soft prompts, then its text. Single spaces join all texts, like prompt
and answer in training; a system message begins the first text. One image with one instruction therefore gives the same
input as `Captioner.answer`. A last turn without text gets the prompt of the adapter's training. The Q-Former of an
instruction-aware adapter reads the text of the last turn with every image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.data.schema import IMAGE, VIDEO
from pipelines.serving.contract.config import RequestLimits
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.contract.schemas import ImagePart, Message, SamplingRequest, TextPart, VideoPart
from pipelines.serving.contract.uploads import Upload, parse_reference
from pipelines.serving.contract.wire import AnswerSettings
from qformer.config import GenerationSettings

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInput:
    """One image or video, with the field of the request that holds it."""

    upload: Upload
    param: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Media and texts in the order of the language model's input."""

    segments: tuple[MediaInput | str, ...]
    instruction: str
    """Instruction for an instruction-aware Q-Former."""

    @property
    def media(self) -> list[MediaInput]:
        """Images and videos in order."""
        return [segment for segment in self.segments if isinstance(segment, MediaInput)]


def single_turn(upload: Upload, text: str, param: str | None) -> Conversation:
    """Conversation of one image or video and one instruction."""
    return Conversation(segments=(MediaInput(upload=upload, param=param), text), instruction=text)


def read_conversation(messages: Sequence[Message], prompt: str, limits: RequestLimits) -> Conversation:
    """Apply the chat template to the messages of a request.

    Args:
        messages: Messages of the request.
        prompt: Prompt of the adapter, for a last turn without text.
        limits: Limits of one request.

    Raises:
        ApiError: 400 or 415 for invalid messages, with the name of the field.
    """
    _require_answerable(messages, limits)
    turns = [(*_turn(message, f"messages[{place}]"), message.role) for place, message in enumerate(messages)]
    if not any(turns[-1][:2]):
        message = "the last message holds neither text nor image nor video; ask something"
        raise ApiError(400, "invalid_request", message, param=f"messages[{len(messages) - 1}].content")
    pending = " ".join(text for _, text, role in turns if role in _SYSTEM and text)
    segments: list[MediaInput | str] = []
    has_text = False  # the text of system messages does not count: it follows the first turn's media
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


def answer_settings(request: SamplingRequest, default: GenerationSettings, limits: RequestLimits) -> AnswerSettings:
    """Generation settings: those of the request, completed by the server's defaults.

    Raises:
        ApiError: 400 if two fields contradict each other, or the request exceeds the token limit.
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
        # OpenAI's clients expect sampling when they set top_p alone.
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


def _turn(message: Message, place: str) -> tuple[list[MediaInput], str]:
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


def _medium(part: ImagePart | VideoPart, param: str) -> MediaInput:
    if isinstance(part, ImagePart):
        param += ".image_url.url"
        return MediaInput(upload=parse_reference(IMAGE, part.image_url.url, param), param=param)
    param += ".video_url.url"
    return MediaInput(upload=parse_reference(VIDEO, part.video_url.url, param), param=param)


def _require_answerable(messages: Sequence[Message], limits: RequestLimits) -> None:
    """Check roles and counts before any media are decoded."""
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
    """Check the total length of texts, before the tokenizer spends time on them.

    Raises:
        ApiError: 400 if it exceeds the limit.
    """
    if (count := sum(map(len, texts))) > limits.max_text_characters:
        message = f"{count} characters of text exceed the limit of {limits.max_text_characters}; shorten them"
        raise ApiError(400, "context_length_exceeded", message, param=param)
