"""Requests that deserve a refusal: each must get a 4xx with a reason, whatever the server's models are."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.media_files import jpeg_bytes
from tests.pipelines.serving.hostile_media import hostile_media

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
CAPTION, VQA, MATCH = "/v1/caption", "/v1/vqa", "/v1/match"
POSTED = (CHAT, EMBEDDINGS, CAPTION, VQA, MATCH)
JSON_TYPE = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Hostile:
    """One request."""

    name: str
    path: str
    body: bytes
    headers: dict[str, str]
    method: str = "POST"


def hostile_requests(num_seeds: int, max_body_bytes: int, search: str) -> Iterator[Hostile]:
    """All of them.

    Args:
        num_seeds: See `hostile_media`.
        max_body_bytes: The server's limit.
        search: Name of a model that embeds and matches.
    """
    for name, kind, content in hostile_media(num_seeds):
        yield from _with_media(name, kind, content, search)
    for name, body in _no_json():
        for path in POSTED:
            yield Hostile(f"{name} to {path}", path, body, JSON_TYPE)
    for name, changes in _CHATS.items():
        yield _posted(name, CHAT, {"messages": [_user("hello")], **changes})
    for place, url in enumerate(_URLS):
        for kind in ("image", "video"):
            yield _posted(f"{kind} url {place}", CHAT, {"messages": [_user([_part(kind, url)])]})
            yield _posted(f"{kind} of a question {place}", VQA, {"question": "what?", kind: url})
            yield _posted(f"{kind} to match {place}", MATCH, {"texts": ["a"], kind: url, "model": search})
            yield _posted(f"{kind} to embed {place}", EMBEDDINGS, {"input": [_part(kind, url)], "model": search})
    for path, bodies in {EMBEDDINGS: _EMBEDDINGS, MATCH: _MATCHES, VQA: _QUESTIONS}.items():
        for place, body in enumerate(bodies):
            yield _posted(f"{path} {place}", path, body)
    yield from _routes(max_body_bytes, search)


def _with_media(name: str, kind: str, content: bytes, search: str) -> Iterator[Hostile]:
    url = f"data:{kind}/x;base64,{base64.b64encode(content).decode()}"
    chat = {"messages": [_user([_part(kind, url), {"type": "text", "text": "what is it?"}])]}
    yield _posted(f"{name} in a chat", CHAT, chat)
    yield _posted(f"{name} in a streamed chat", CHAT, {**chat, "stream": True})
    yield Hostile(f"{name} as it is", CAPTION, content, {"Content-Type": f"{kind}/x"})
    yield Hostile(f"{name} under another type", CAPTION, content, {"Content-Type": "application/octet-stream"})
    yield _posted(f"{name} to caption", CAPTION, {kind: url})
    yield _posted(f"{name} to match", MATCH, {kind: url, "texts": ["a ball"], "model": search})
    yield _posted(f"{name} to embed", EMBEDDINGS, {"input": [_part(kind, url)], "model": search})


def _no_json() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "an open brace", b"{"
    yield "a list", b"[]"
    yield "null", b"null"
    yield "a number", b"17"
    yield "a string", b'"hello"'
    yield "no UTF-8", b'{"model": "\xff\xfe"}'
    yield "UTF-16", '{"model": "demo"}'.encode("utf-16")
    yield "a lone surrogate", b'{"model": "\\ud800"}'
    yield "nulls", bytes(100)
    yield "NaN", b'{"temperature": NaN}'
    yield "no end", b'{"messages": [{"role": "user", "content": "hel'
    yield "deep lists", b"[" * 100_000
    yield "deep objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    yield "a deep field", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    yield "many fields", json.dumps({str(number): number for number in range(60_000)}).encode()
    yield "a huge number", b'{"max_tokens": 1' + b"0" * 5000 + b"}"
    yield "form", b"messages=hello&model=demo"


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _part(kind: str, url: Any) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _posted(name: str, path: str, body: Any) -> Hostile:
    return Hostile(name, path, json.dumps(body).encode(), JSON_TYPE)


_PICTURE = f"data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(0, (32, 32))).decode()}"
_URLS: Sequence[Any] = (
    "",
    " ",
    3,
    None,
    [],
    {},
    "hello",
    "data:",
    "data:,",
    "data:image/png,abc",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,====",
    "data:image/png;base64,!!!!",
    "data:image/png;base64,AAAAA",
    "data:image/png;base64,AA=AA",
    "data:text/html;base64,PGgxPg==",
    "data:image/png;base64," + "é" * 8,
    "data:" + "a" * 100_000 + ";base64,AAAA",
    "data:" + ";" * 200_000,
    "file:///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "http://127.0.0.1/x.jpg",
    "https://localhost/x.jpg",
    "https://[::1]/x.jpg",
    "https://169.254.169.254/latest/meta-data",
    "https://10.0.0.1/x.jpg",
    "https://0x7f000001/x.jpg",
    "https://example.org/x.jpg",
    "https://user:password@example.org/x.jpg",
    "https://" + "a" * 5000,
    "ftp://example.org/x.jpg",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "s3://bucket/key",
    "javascript:alert(1)",
    "\x00\x01",
)
_CHATS: dict[str, dict[str, Any]] = {
    "no messages": {"messages": []},
    "messages of null": {"messages": None},
    "a message that is text": {"messages": ["hello"]},
    "an empty message": {"messages": [{}]},
    "content of null": {"messages": [_user(None)]},
    "content of a number": {"messages": [_user(3)]},
    "content of no text": {"messages": [_user("")]},
    "content of space": {"messages": [_user("hello"), {"role": "assistant", "content": "hi"}, _user(" \n")]},
    "a part of no text": {"messages": [_user([{"type": "text", "text": ""}])]},
    "a part of space beside an image": {
        "messages": [_user([_part("image", _PICTURE), {"type": "text", "text": "\t "}])]
    },
    "no parts": {"messages": [_user([])]},
    "a part of no type": {"messages": [_user([{"text": "hello"}])]},
    "a part of another type": {"messages": [_user([{"type": "input_audio", "input_audio": {}}])]},
    "an image without its url": {"messages": [_user([{"type": "image_url"}])]},
    "an image that is a string": {"messages": [_user([{"type": "image_url", "image_url": _PICTURE}])]},
    "a role of a tool": {"messages": [{"role": "tool", "content": "hello"}]},
    "a role of null": {"messages": [{"role": None, "content": "hello"}]},
    "an assistant last": {"messages": [_user("hello"), {"role": "assistant", "content": "hello"}]},
    "1,000 messages": {"messages": [_user("hello")] * 1000},
    "1,000 images": {"messages": [_user([_part("image", _PICTURE)] * 1000)]},
    "1,000 empty images": {"messages": [_user([_part("image", "data:image/png;base64,AAAA")] * 1000)]},
    "10,000 tokens": {"messages": [_user("ball " * 10_000)]},
    "a long text": {"messages": [_user("a" * 1_000_000)]},
    "a long system text": {"messages": [{"role": "system", "content": "ball " * 20_000}, _user("hello")]},
    "an unknown model": {"model": "nobody"},
    "a model of a path": {"model": "../../etc/passwd"},
    "a model of no name": {"model": ""},
    "a long model": {"model": "a" * 100_000},
    "a model of a number": {"model": 3},
    "a cold temperature": {"temperature": -1},
    "a hot temperature": {"temperature": 1e9},
    "a temperature of text": {"temperature": "0.5"},
    "top_p of 0": {"top_p": 0},
    "top_p of 2": {"top_p": 2},
    "no tokens": {"max_tokens": 0},
    "fewer than no tokens": {"max_tokens": -5},
    "a billion tokens": {"max_tokens": 10**9},
    "half a token": {"max_tokens": 1.5},
    "tokens of text": {"max_tokens": "many"},
    "two kinds of max_tokens": {"max_tokens": 3, "max_completion_tokens": 10**9},
    "a large seed": {"seed": 2**80},
    "five stops": {"stop": ["a", "b", "c", "d", "e"]},
    "an empty stop": {"stop": [""]},
    "a long stop": {"stop": "a" * 10_000},
    "two answers": {"n": 2},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "logprobs": {"logprobs": True},
    "logprobs of 0": {"logprobs": 0},
    "a penalty of false": {"frequency_penalty": False},
    "store of 0": {"store": 0},
    "n of true": {"n": True},
    "a JSON answer": {"response_format": {"type": "json_object"}},
    "a stream of text": {"stream": "yes"},
    "options without a stream": {"stream_options": {"include_usage": True}},
    "an unknown field": {"messages_": []},
    "an unknown deep field": {"messages": [{**_user("hello"), "path": "/etc/passwd"}]},
}
_EMBEDDINGS: Sequence[dict[str, Any]] = (
    {},
    {"input": None},
    {"input": ""},
    {"input": []},
    {"input": [""]},
    {"input": ["a", ""]},
    {"input": [{"type": "text", "text": " "}]},
    {"input": [1, 2, 3]},
    {"input": ["a"] * 10_000},
    {"input": "a" * 1_000_000},
    {"input": "a", "encoding_format": "hex"},
    {"input": "a", "dimensions": 3},
    {"input": "a", "pooling": "max"},
    {"input": "a", "model": "nobody"},
    {"input": [_part("image", _PICTURE)] * 500},
)
_MATCHES: Sequence[dict[str, Any]] = (
    {},
    {"texts": ["a"]},
    {"image": _PICTURE},
    {"image": _PICTURE, "texts": []},
    {"image": _PICTURE, "texts": "a"},
    {"image": _PICTURE, "texts": ["a", " "]},
    {"image": _PICTURE, "texts": ["a"] * 10_000},
    {"image": _PICTURE, "texts": ["a" * 1_000_000]},
    {"image": _PICTURE, "video": _PICTURE, "texts": ["a"]},
    {"image": _PICTURE, "texts": ["a"], "model": "nobody"},
)
_QUESTIONS: Sequence[dict[str, Any]] = (
    {},
    {"question": "what?"},
    {"image": _PICTURE},
    {"image": _PICTURE, "question": ""},
    {"image": _PICTURE, "question": " "},
    {"image": _PICTURE, "question": 3},
    {"image": _PICTURE, "question": "ball " * 10_000},
    {"image": _PICTURE, "video": _PICTURE, "question": "what?"},
    {"image": _PICTURE, "question": "what?", "model": "nobody"},
)


def _routes(max_body_bytes: int, search: str) -> Iterator[Hostile]:
    for path in POSTED:
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            yield Hostile(f"{method} {path}", path, b"", {}, method)
        yield Hostile(f"too much to {path}", path, bytes(max_body_bytes + 1), JSON_TYPE)
    for path in (
        "/v1",
        "/v1/",
        "/v1/models/nobody",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
        "/v1/files",
        "/v1/chat",
        "/nowhere",
        "/console/",
        "/console/..%2fapi.py",
        "/console/%00",
        "/.git/config",
        "/" + "a" * 5000,
    ):
        yield Hostile(f"GET {path[:40]}", path, b"", {}, "GET")
    good = {
        CHAT: {"messages": [_user("hello")]},
        EMBEDDINGS: {"input": "hello", "model": search},
        VQA: {"image": _PICTURE, "question": "what?"},
        MATCH: {"image": _PICTURE, "texts": ["a"], "model": search},
    }
    for path, body in good.items():
        for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
            yield Hostile(f"good JSON to {path} as {headers}", path, json.dumps(body).encode(), headers)
    for content_type in ("text/plain", "multipart/form-data; boundary=x", "audio/wav"):
        yield Hostile(f"caption of {content_type!r}", CAPTION, jpeg_bytes(), {"Content-Type": content_type})
