"""The OpenAPI page, made of the request schemas that are enforced, with an example of every endpoint."""

import functools
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipelines.serving.schemas import (
    CaptionRequest,
    ChatRequest,
    EmbeddingRequest,
    MatchRequest,
    VqaRequest,
)

_REFERENCE = "#/components/schemas/{model}"
_DATA = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4b6AAAAOBAVBiW3PyAAAAAElFTkSuQmCC"
)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What to change."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "null"], "description": "Stable, for programs."},
            },
        }
    },
}
_REFUSALS = {
    "400": "The request is wrong; `message` says what to change.",
    "401": "No API key, or a wrong one.",
    "403": "A URL that may not be fetched.",
    "404": "No such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "Not the media type that was declared, or one that is not read.",
    "422": "The media cost too much, or cannot be fetched.",
    "429": "A limit of the API key; see Retry-After.",
    "500": "The server failed.",
    "503": "Busy, or a replica was lost; see Retry-After.",
    "504": "The request took too long.",
}


async def document(request: Request) -> JSONResponse:
    """GET /openapi.json."""
    return JSONResponse(_document())


@functools.cache
def _document() -> dict[str, Any]:
    models = (ChatRequest, EmbeddingRequest, CaptionRequest, VqaRequest, MatchRequest)
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
    keyed: list[dict[str, list[str]]] = [{"bearer": []}, {}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Q-Former",
            "version": "1",
            "description": "Chats, captions, answers, embeddings and matches of images and videos, by OpenAI's "
            "interface and a few task endpoints.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _post("Chat about images and videos", ChatRequest, _chat(), keyed)},
            "/v1/embeddings": {"post": _post("Embed texts, images and videos", EmbeddingRequest, _embedding(), keyed)},
            "/v1/caption": {"post": _caption(keyed)},
            "/v1/vqa": {"post": _post("Answer a question", VqaRequest, _vqa(), keyed)},
            "/v1/match": {"post": _post("How well texts fit an image or a video", MatchRequest, _match(), keyed)},
            "/v1/models": {"get": _get("The models of this server", _MODELS, keyed)},
            "/v1/models/{model}": {
                "get": _get("One model", _MODELS["data"][0], keyed)
                | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            "/healthz": {"get": _get("Whether the process answers", {"status": "ok", "model": "demo/step-300"}, [])},
            "/readyz": {"get": _get("Whether the models answer", {"status": "ok", "model": "demo/step-300"}, [])},
        },
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(
    summary: str, model: type[BaseModel], examples: tuple[dict[str, Any], Any], security: list[Any]
) -> dict[str, Any]:
    requests, answer = examples
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    named = {name: {"value": value} for name, value in requests.items()}
    body = {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}
    return {"summary": summary, "security": security, "requestBody": body, "responses": _responses(answer)}


def _get(summary: str, answer: Any, security: list[Any]) -> dict[str, Any]:
    return {"summary": summary, "security": security, "responses": _responses(answer)}


def _responses(answer: Any) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    refusals = {status: {"description": text, "content": error} for status, text in _REFUSALS.items()}
    content = {"application/json": {"schema": {"type": "object"}, "example": answer}}
    return {"200": {"description": "The answer.", "content": content}, **refusals}


def _caption(security: list[Any]) -> dict[str, Any]:
    answer = {"caption": "a red ball", "kind": "image", "num_frames": 1, "model": "demo/step-300"}
    operation = _post("Caption an image or a video", CaptionRequest, ({"image": {"image": _DATA}}, answer), security)
    raw = {"schema": {"type": "string", "format": "binary"}}
    operation["requestBody"]["content"] |= {"image/*": raw, "video/*": raw}
    return operation


def _chat() -> tuple[dict[str, Any], Any]:
    image = {"type": "image_url", "image_url": {"url": _DATA}}
    question = {"role": "user", "content": [image, {"type": "text", "text": "What colour is the ball?"}]}
    more = [question, {"role": "assistant", "content": "red"}, {"role": "user", "content": "How many are there?"}]
    message = {"role": "assistant", "content": "red", "refusal": None}
    answer = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1764180000,
        "model": "demo/step-300",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 2, "total_tokens": 42},
    }
    requests = {
        "image": {"messages": [question], "max_tokens": 16},
        "several turns": {"messages": more, "temperature": 0.7, "top_p": 0.9, "seed": 1},
        "stream": {"messages": [question], "stream": True, "stream_options": {"include_usage": True}},
    }
    return requests, answer


def _embedding() -> tuple[dict[str, Any], Any]:
    requests = {
        "texts": {"input": ["a red ball", "two dogs"]},
        "image": {"input": [{"type": "image_url", "image_url": {"url": _DATA}}], "pooling": "queries"},
    }
    entry = {"object": "embedding", "index": 0, "embedding": [0.6, 0.8], "shape": [2]}
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return requests, {"object": "list", "data": [entry], "model": "search/step-300", "usage": usage}


def _vqa() -> tuple[dict[str, Any], Any]:
    requests = {"question": {"image": _DATA, "question": "What colour is the ball?"}}
    return requests, {"answer": "red", "kind": "image", "num_frames": 1, "model": "demo/step-300"}


def _match() -> tuple[dict[str, Any], Any]:
    requests = {"texts": {"image": _DATA, "texts": ["a red ball", "two dogs"]}}
    scores = [{"probability": 0.98, "similarity": 0.41}, {"probability": 0.02, "similarity": 0.11}]
    return requests, {"scores": scores, "kind": "image", "num_frames": 1, "model": "search/step-300"}


_MODELS = {
    "object": "list",
    "data": [
        {
            "id": "demo",
            "object": "model",
            "created": 1764180000,
            "owned_by": "qformer",
            "version": "demo/step-300",
            "tasks": ["chat", "caption", "vqa"],
        }
    ],
}
