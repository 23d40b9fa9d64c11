"""The OpenAPI document, generated from the request schemas, with examples of every endpoint."""

import functools
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipelines.serving.contract.openapi_answers import EXAMPLES, SCHEMAS, STREAM, refusal_example
from pipelines.serving.contract.schemas import (
    CaptionRequest,
    ChatRequest,
    EmbeddingRequest,
    MatchRequest,
    VqaRequest,
)

_KEYED: list[dict[str, list[str]]] = [{"bearer": []}, {}]
_REFERENCE = "#/components/schemas/{model}"
_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4b6AAAAOBAVBiW3PyAAAAAElFTkSuQmCC"
)
_VIDEO = (
    "data:video/webm;base64,"
    "GkXfo59ChoEBQveBAULygQRC84EIQoKEd2VibUKHgQJChYECGFOAZwEAAAAAAAHpEU2bdLpNu4tTq4QVSalmU6yBoU27i1OrhBZUrmtTrIHYTb"
    "uMU6uEElTDZ1OsggEbTbuMU6uEHFO7a1OsggHT7AEAAAAAAABZAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAVSalmsirXsYMPQkBNgI1MYXZmNjIuMTIuMTAyV0GNTGF2ZjYyLj"
    "EyLjEwMkSJiECPQAAAAAAAFlSua76uAQAAAAAAADXXgQFzxYjwEl/YaXw4BZyBACK1nIN1bmSIgQCGhVZfVlA4g4EBI+ODhB3NZQDghrCBELqB"
    "EBJUw2fYc3OgY8CAZ8iaRaOHRU5DT0RFUkSHjUxhdmY2Mi4xMi4xMDJzc7JjwItjxYjwEl/YaXw4BWfIoUWjiERVUkFUSU9ORIeTMDA6MDA6MD"
    "EuMDAwMDAwMDAwAB9DtnXW54EAo6OBAACAEAIAnQEqEAAQAABHCIWFiIWEiAICAAwNYAD+/6tQgKOsgQH0ABECAAUQrAAYCdaoCDLmsvNAJAD+"
    "7+5j61MjH0Yv/rgP/nAf/OA/lYAcU7trkbuPs4EAt4r3gQHxggF48IED"
)
"""A clip of two frames, black and red."""
_REFUSALS = {
    400: ("The request is invalid; `message` says what to change.", "invalid_request", "'messages' is missing"),
    401: ("No API key, or a wrong one.", "invalid_api_key", "the API key is not known; check the Authorization header"),
    403: (
        "A URL that may not be fetched, or a `Host` that is not the server's.",
        "url_not_allowed",
        "this server fetches nothing from 'example.org'",
    ),
    404: ("No such model or page.", "model_not_found", "the model 'x' does not exist; GET /v1/models lists all"),
    405: ("Wrong method; see Allow.", "method_not_allowed", "GET /v1/caption: Method Not Allowed"),
    408: ("The body did not arrive in time.", "body_timeout", "the body did not come within 20 s; send it faster"),
    413: ("The body is too large.", "body_too_large", "the body exceeds 67108864 bytes; send a smaller file"),
    415: (
        "Another media type than declared, or an unsupported one.",
        "unsupported_media_type",
        "Content-Type is 'text/plain'; send JSON as application/json",
    ),
    422: (
        "The media exceed a limit, or cannot be fetched.",
        "media_too_large",
        "the video cannot be used: 7200 s exceed the limit of 3600 s; send a smaller one",
    ),
    429: ("A limit of the API key; see Retry-After.", "rate_limit_exceeded", "more than 60 requests a minute"),
    500: ("The server failed.", "internal", "the server failed on this request; its log says why"),
    503: ("Busy, or a replica was lost; see Retry-After.", "overloaded", "too many requests in work; try again"),
    504: ("The request took too long.", "timeout", "the request took longer than 60 s; ask for less, or try again"),
}
_GET_STATUSES, _PROBE_STATUSES = (401, 403, 404, 405, 429, 500, 503, 504), (403, 405, 503)


async def document(request: Request) -> JSONResponse:
    """GET /openapi.json."""
    return JSONResponse(_document())


@functools.cache
def _document() -> dict[str, Any]:
    models = (ChatRequest, EmbeddingRequest, CaptionRequest, VqaRequest, MatchRequest)
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Q-Former",
            "version": "1",
            "description": "Chats, captions, answers, embeddings and matches of images and videos, by OpenAI's "
            "interface and a few task endpoints.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _chat()},
            "/v1/embeddings": {"post": _embeddings()},
            "/v1/caption": {"post": _caption()},
            "/v1/vqa": {"post": _vqa()},
            "/v1/match": {"post": _match()},
            "/v1/models": {"get": _get("The models of this server", "Models", _GET_STATUSES)},
            "/v1/models/{model}": {
                "get": _get("One model", "Model", _GET_STATUSES)
                | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            "/healthz": {"get": _get("Whether the process answers", "Health", _PROBE_STATUSES)},
            "/readyz": {"get": _get("Whether the models answer", "Health", _PROBE_STATUSES)},
        },
        "components": {
            "schemas": {**schemas["$defs"], **SCHEMAS},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(summary: str, model: type[BaseModel], answer: str, requests: dict[str, Any]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    named = {name: {"value": value} for name, value in requests.items()}
    body = {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}
    return {
        "summary": summary,
        "security": _KEYED,
        "requestBody": body,
        "responses": _responses(answer, tuple(_REFUSALS)),
    }


def _get(summary: str, answer: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    security = _KEYED if 401 in statuses else []
    return {"summary": summary, "security": security, "responses": _responses(answer, statuses)}


def _responses(answer: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    found = {"200": {"description": "The answer.", "content": _content(answer, EXAMPLES[answer])}}
    for status in statuses:
        description, code, message = _REFUSALS[status]
        content = _content("Error", refusal_example(status, code, message))
        found[str(status)] = {"description": description, "content": content}
    return found


def _content(schema: str, example: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=schema)}, "example": example}}


def _chat() -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": _IMAGE}}
    video = {"type": "video_url", "video_url": {"url": _VIDEO}}
    question = {"role": "user", "content": [image, {"type": "text", "text": "What colour is the ball?"}]}
    video_question = {"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}
    more = [question, {"role": "assistant", "content": "red"}, {"role": "user", "content": "How many are there?"}]
    requests = {
        "image": {"messages": [question], "max_tokens": 16},
        "video": {"messages": [video_question], "max_tokens": 16},
        "several turns": {"messages": more, "temperature": 0.7, "top_p": 0.9, "seed": 1},
        "stream": {"messages": [question], "stream": True, "stream_options": {"include_usage": True}},
    }
    operation = _post("Chat about images and videos", ChatRequest, "ChatCompletion", requests)
    description = (
        "Where `stream` is true: the data of each event is a ChatCompletionChunk, at the end `[DONE]`; or, where the "
        "answer breaks off, an Error."
    )
    stream = {"schema": {"type": "string", "description": description}, "example": STREAM}
    operation["responses"]["200"]["content"]["text/event-stream"] = stream
    return operation


def _embeddings() -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": _IMAGE}}
    video = {"type": "video_url", "video_url": {"url": _VIDEO}}
    requests = {
        "texts": {"input": ["a red ball", "two dogs"]},
        "image": {"input": [image], "pooling": "queries"},
        "all together": {"input": [{"type": "text", "text": "a red ball"}, image, video], "encoding_format": "base64"},
    }
    return _post("Embed texts, images and videos", EmbeddingRequest, "Embeddings", requests)


def _caption() -> dict[str, Any]:
    requests = {"image": {"image": _IMAGE}, "video": {"video": _VIDEO}}
    operation = _post("Caption an image or a video", CaptionRequest, "Caption", requests)
    for kind, file in (("image/jpeg", "photo.jpg"), ("video/mp4", "clip.mp4")):
        command = f"curl --data-binary @{file} -H 'Content-Type: {kind}' http://127.0.0.1:8000/v1/caption"
        raw = {"schema": {"type": "string", "format": "binary"}, "examples": {"file": {"summary": command}}}
        operation["requestBody"]["content"][kind.split("/")[0] + "/*"] = raw
    return operation


def _vqa() -> dict[str, Any]:
    requests = {"question": {"image": _IMAGE, "question": "What colour is the ball?"}}
    return _post("Answer a question", VqaRequest, "Answer", requests)


def _match() -> dict[str, Any]:
    requests = {"texts": {"image": _IMAGE, "texts": ["a red ball", "two dogs"]}}
    return _post("How well texts fit an image or a video", MatchRequest, "Matches", requests)
