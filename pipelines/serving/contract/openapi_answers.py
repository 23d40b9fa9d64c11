"""JSON schemas of the answers, each with an example; tests validate real answers against them."""

import json
from typing import Any

from pipelines.serving.contract.errors import Refusal

Schema = dict[str, Any]
_TEXT, _COUNT, _NUMBER, _NULL = ({"type": name} for name in ("string", "integer", "number", "null"))
_FINISH = {"enum": ["stop", "length"]}
_KIND = {"enum": ["image", "video"]}


def _object(*optional: str, **properties: Schema) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(items: Schema, described: str | None = None) -> Schema:
    return {"type": "array", "items": items} | ({} if described is None else {"description": described})


def _described(schema: Schema, text: str) -> Schema:
    return {**schema, "description": text}


_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _described(_TEXT, "Checkpoint that answered.")}
_MEDIUM = {"kind": _KIND, "num_frames": _described(_COUNT, "Frames that the model read."), "model": _TEXT}
_MODEL = _object(
    id=_described(_TEXT, "Name for requests."),
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    version=_described(_TEXT, "Checkpoint that is loaded now."),
    tasks=_array(_TEXT),
)
SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(
            message=_described(_TEXT, "What to change."),
            type=_TEXT,
            param={"type": ["string", "null"], "description": "The field that is wrong."},
            code=_described(_TEXT, "Stable, for programs."),
        )
    ),
    "ChatCompletion": _object(
        **_HEAD,
        object={"const": "chat.completion"},
        choices=_array(
            _object(
                index=_COUNT,
                message=_object(role={"const": "assistant"}, content=_TEXT, refusal=_NULL),
                logprobs=_NULL,
                finish_reason=_FINISH,
            )
        ),
        usage=_USAGE,
    ),
    "ChatCompletionChunk": _object(
        "usage",
        **_HEAD,
        object={"const": "chat.completion.chunk"},
        choices=_array(
            _object(
                index=_COUNT,
                delta=_object("role", "content", role={"const": "assistant"}, content=_TEXT),
                logprobs=_NULL,
                finish_reason={"enum": ["stop", "length", None]},
            ),
            "Empty in the chunk with the usage.",
        ),
        usage={"anyOf": [_USAGE, _NULL], "description": "Present with stream_options.include_usage."},
    ),
    "Embeddings": _object(
        object={"const": "list"},
        data=_array(
            _object(
                object={"const": "embedding"},
                index=_COUNT,
                embedding={"anyOf": [_array(_NUMBER), _described(_TEXT, "base64 of little-endian float32.")]},
                shape=_array(_COUNT, "[width], or [queries, width]."),
            )
        ),
        model=_TEXT,
        usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "Caption": _object(caption=_TEXT, **_MEDIUM),
    "Answer": _object(answer=_TEXT, **_MEDIUM),
    "Matches": _object(
        scores=_array(
            _object(
                probability=_described(_NUMBER, "Output of the matching head (ITM), 0 to 1."),
                similarity=_described(_NUMBER, "Cosine similarity of the embeddings (ITC), -1 to 1."),
            ),
            "One entry per text, in order.",
        ),
        **_MEDIUM,
    ),
    "Models": _object(object={"const": "list"}, data=_array(_MODEL)),
    "Model": _MODEL,
    "Health": _object(status={"const": "ok"}, model=_TEXT),
}

_ANSWER_FIELDS = {"kind": "image", "num_frames": 1, "model": "demo/step-300"}
_CHUNK = {"id": "chatcmpl-0123456789abcdef", "created": 1764180000, "model": "demo/step-300"}
_CHAT_USAGE = {"prompt_tokens": 40, "completion_tokens": 2, "total_tokens": 42}
_DEMO = {
    "id": "demo",
    "object": "model",
    "created": 1764180000,
    "owned_by": "qformer",
    "version": "demo/step-300",
    "tasks": ["chat", "caption", "vqa"],
}
EXAMPLES: dict[str, Any] = {
    "ChatCompletion": {
        **_CHUNK,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "red", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _CHAT_USAGE,
    },
    "Embeddings": {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8], "shape": [2]}],
        "model": "search/step-300",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    },
    "Caption": {"caption": "a red ball", **_ANSWER_FIELDS},
    "Answer": {"answer": "red", **_ANSWER_FIELDS},
    "Matches": {
        "scores": [{"probability": 0.98, "similarity": 0.41}, {"probability": 0.02, "similarity": 0.11}],
        **_ANSWER_FIELDS,
        "model": "search/step-300",
    },
    "Models": {"object": "list", "data": [_DEMO]},
    "Model": _DEMO,
    "Health": {"status": "ok", "model": "demo/step-300"},
}


def chunk(choices: list[Any], usage: Any = None) -> dict[str, Any]:
    """A chunk of a streamed answer."""
    return {**_CHUNK, "object": "chat.completion.chunk", "choices": choices, "usage": usage}


def _stream() -> str:
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "red"}, None),
        ({}, "stop"),
    ]
    chunks = [
        chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]) for delta, reason in deltas
    ]
    lines = [json.dumps(one) for one in [*chunks, chunk([], _CHAT_USAGE)]]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])


STREAM = _stream()
"""A streamed answer as server-sent events, with usage."""


def refusal_example(status: int, code: str, message: str) -> dict[str, Any]:
    """The body of an error."""
    return Refusal(status, code, message).body()
