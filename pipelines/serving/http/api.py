"""The HTTP interface: endpoints over `Models`. Which processes do the work is the caller's choice."""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from pipelines.data.schema import IMAGE, VIDEO
from pipelines.serving.contract.adapters import Adapter, AdapterTable
from pipelines.serving.contract.config import ApiKey, ServingConfig
from pipelines.serving.contract.errors import ApiError, add_error_handlers
from pipelines.serving.contract.openapi import document
from pipelines.serving.contract.schemas import (
    CaptionRequest,
    ChatRequest,
    EmbeddingRequest,
    ImagePart,
    MatchRequest,
    Sampled,
    TaskMedia,
    TextPart,
    VqaRequest,
    validated,
)
from pipelines.serving.contract.uploads import parse_raw, parse_reference
from pipelines.serving.http.admission import Context, Gate, Handler, StreamedAnswer
from pipelines.serving.http.answers import Work, mean_pooled, together
from pipelines.serving.http.bodies import parse_json, read_body
from pipelines.serving.http.body_ahead import BodyFromHead
from pipelines.serving.http.chat import Medium, answer_settings, read_conversation, require_short, single_turn
from pipelines.serving.http.console_files import add_console
from pipelines.serving.http.heads import CheckedHead
from pipelines.serving.http.health import Canary
from pipelines.serving.http.keys import KeyRing
from pipelines.serving.http.records import Reporter
from pipelines.serving.http.sse import closing, events, usage, whole_answer
from pipelines.serving.workers.graph import Models

LARGE_BODY_BYTES = 256 * 1024
"""Bodies from here on are parsed beside the event loop."""


class Api:
    """The endpoints.

    Args:
        config: What stays as it is.
        models: Do the work.
    """

    def __init__(self, config: ServingConfig, models: Models) -> None:
        self._config, self._models, self._limits = config, models, config.requests
        self.gate = Gate(config.requests, models, Reporter())
        self._adapters: AdapterTable | None = None
        self._canary = Canary(models)
        self.is_local = config.is_local
        """See `heads.check_head`."""
        self._started_s = int(time.time())

    def update(self, adapters: Sequence[Adapter], keys: Sequence[ApiKey]) -> None:
        """Serve other adapters and keys from the next request on."""
        self._canary = Canary(self._models)  # the song of others tells nothing of these
        self._adapters, self.gate.keys = AdapterTable(adapters), KeyRing(keys)
        self.is_local = self._config.is_local and not keys

    @property
    def adapters(self) -> AdapterTable:
        """What is served now."""
        assert self._adapters is not None, "update() comes first"
        return self._adapters

    async def chat(self, request: Request, context: Context) -> Any:
        """POST /v1/chat/completions."""
        body = await self._body(request, context)
        asked, conversation, adapter = await _aside(body, self._read_chat)
        settings = answer_settings(asked, self._config.generation, self._limits)
        prompt = await Work(self._models, context).prompt(conversation, adapter, settings)
        record, model = context.record, adapter.version
        if not asked.stream:
            piece = await self._models.answer(prompt)
            record.prompt_tokens, record.completion_tokens = piece.prompt_tokens, piece.completion_tokens
            return whole_answer(context, model, piece)
        record.is_streamed = True
        pieces = self._models.stream(prompt)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        record.first_token()
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        stack = closing(pieces, context.keep())
        return StreamedAnswer(events(context, model, first, pieces, with_usage=with_usage), stack)

    def _read_chat(self, body: bytes) -> Any:
        asked = validated(ChatRequest, parse_json(body))
        if asked.stream_options is not None and not asked.stream:
            message = "stream_options is for streams; set stream: true or leave it out"
            raise ApiError(400, "invalid_request", message, param="stream_options")
        adapter = self.adapters.find(asked.model, generates=True)
        return asked, read_conversation(asked.messages, adapter.prompt, self._limits), adapter

    async def caption(self, request: Request, context: Context) -> Any:
        """POST /v1/caption."""
        return await self._task(request, context, CaptionRequest, "caption")

    async def vqa(self, request: Request, context: Context) -> Any:
        """POST /v1/vqa."""
        return await self._task(request, context, VqaRequest, "answer")

    async def _task(
        self, request: Request, context: Context, schema: type[CaptionRequest] | type[VqaRequest], name: str
    ) -> Any:
        body = await self._body(request, context, is_json=schema is VqaRequest)

        def read(body: bytes) -> tuple[Sampled, Medium]:
            if schema is CaptionRequest and not _is_json(request):
                return Sampled(), Medium(upload=parse_raw(request.headers.get("content-type"), body), param=None)
            asked = validated(schema, parse_json(body))
            return asked, _medium_of(asked)

        asked, medium = await _aside(body, read)
        adapter = self.adapters.find(asked.model, generates=True)
        text = asked.question.strip() if isinstance(asked, VqaRequest) else ""
        require_short([text], self._limits, "question")
        conversation = single_turn(medium.upload, text or adapter.prompt, medium.param)
        settings = answer_settings(asked, self._config.generation, self._limits)
        prompt = await Work(self._models, context).prompt(conversation, adapter, settings)
        piece = await self._models.answer(prompt)
        record = context.record
        record.prompt_tokens, record.completion_tokens = piece.prompt_tokens, piece.completion_tokens
        return {
            name: piece.text,
            "kind": medium.upload.kind,
            "num_frames": record.num_frames,
            "model": adapter.version,
        }

    async def match(self, request: Request, context: Context) -> Any:
        """POST /v1/match."""

        def read(body: bytes) -> tuple[MatchRequest, Medium]:
            asked = validated(MatchRequest, parse_json(body))
            return asked, _medium_of(asked)

        asked, medium = await _aside(await self._body(request, context), read)
        self._require_few(asked.texts, "texts")
        require_short(asked.texts, self._limits, "texts")
        context.record.adapter = adapter = self.adapters.find(asked.model, generates=False)
        decoded = await Work(self._models, context).decode(medium, adapter)
        matched = await self._models.match(adapter, decoded, asked.texts)
        return {
            "scores": [{"probability": one.probability, "similarity": one.similarity} for one in matched],
            "kind": medium.upload.kind,
            "num_frames": len(decoded.pixels),
            "model": adapter.version,
        }

    async def embeddings(self, request: Request, context: Context) -> Any:
        """POST /v1/embeddings."""
        asked, inputs = await _aside(await self._body(request, context), self._read_embedding)
        context.record.adapter = adapter = self.adapters.find(asked.model, generates=False)
        work = Work(self._models, context)
        texts = [one for one in inputs if isinstance(one, str)]
        media = [one for one in inputs if isinstance(one, Medium)]
        queries = await together([work.embed(medium, adapter) for medium in media]) if media else []
        found = await self._models.embed_texts(adapter, texts) if texts else None
        rows, vectors = iter(queries), iter(() if found is None else found.vectors)
        data: list[dict[str, Any]] = []
        for index, one in enumerate(inputs):
            array = next(vectors) if isinstance(one, str) else next(rows)
            if array.ndim == 2 and asked.pooling == "mean":
                array = mean_pooled(array)
            encoded = _encoded(array, asked.encoding_format)
            data.append({"object": "embedding", "index": index, "embedding": encoded, "shape": list(array.shape)})
        context.record.prompt_tokens = (found.num_tokens if found else 0) + sum(map(len, queries))
        return {
            "object": "list",
            "data": data,
            "model": adapter.version,
            "usage": {name: n for name, n in usage(context.record.prompt_tokens).items() if name[0] != "c"},
        }

    def _read_embedding(self, body: bytes) -> tuple[EmbeddingRequest, list[str | Medium]]:
        asked = validated(EmbeddingRequest, parse_json(body))
        parts = [asked.input] if isinstance(asked.input, str) else asked.input
        self._require_few(parts, "input")
        inputs: list[str | Medium] = []
        for place, part in enumerate(parts):
            if isinstance(part, str | TextPart):
                inputs.append(part if isinstance(part, str) else part.text)
                continue
            kind, url = (IMAGE, part.image_url) if isinstance(part, ImagePart) else (VIDEO, part.video_url)
            param = f"input[{place}].{kind}_url.url"
            inputs.append(Medium(upload=parse_reference(kind, url.url, param), param=param))
        texts = [one for one in inputs if isinstance(one, str)]
        if not all(text.strip() for text in texts):
            raise ApiError(400, "invalid_request", "an input is empty; give it a text", param="input")
        require_short(texts, self._limits, "input")
        if len(inputs) - len(texts) > self._limits.max_media:
            message = f"more than {self._limits.max_media} images and videos; send fewer at a time"
            raise ApiError(400, "too_many_media", message, param="input")
        return asked, inputs

    async def models(self, request: Request, context: Context) -> Any:
        """GET /v1/models."""
        return {"object": "list", "data": [self._described(adapter) for adapter in self.adapters.all]}

    async def model(self, request: Request, context: Context) -> Any:
        """GET /v1/models/{model}."""
        name = request.path_params["model"]
        for adapter in self.adapters.all:
            if name in (adapter.name, adapter.version):
                return self._described(adapter)
        message = f"the model {name[:100]!r} does not exist; GET /v1/models lists all"
        raise ApiError(404, "model_not_found", message, param="model")

    async def live(self, request: Request) -> Any:
        """GET /healthz: this process answers."""
        return {"status": "ok", "model": self.adapters.default.version}

    async def ready(self, request: Request) -> Any:
        """GET /readyz: a picture goes through the whole graph, for one adapter of each stage."""
        await self._canary.sing(self.adapters)
        return {"status": "ok", "model": self.adapters.default.version}

    def _described(self, adapter: Adapter) -> dict[str, Any]:
        tasks = ["chat", "caption", "vqa"] if adapter.generates else ["embeddings", "match"]
        return {
            "id": adapter.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "qformer",
            "version": adapter.version,
            "tasks": tasks,
        }

    async def _body(self, request: Request, context: Context, *, is_json: bool = True) -> bytes:
        if is_json and not _is_json(request):
            # Also what keeps the pages of other sites out: browsers let them send other types without asking.
            told = request.headers.get("content-type", "")[:80]
            message = f"Content-Type is {told!r}; send JSON as application/json"
            raise ApiError(415, "unsupported_media_type", message)
        body = await read_body(request.stream(), request.headers.get("content-length"), self._limits)
        context.record.body_bytes = len(body)
        context.record.reached("received")
        return body

    def _require_few(self, inputs: Sequence[Any], param: str) -> None:
        if len(inputs) > self._limits.max_embedding_inputs:
            message = f"{len(inputs)} entries exceed the limit of {self._limits.max_embedding_inputs}; send fewer"
            raise ApiError(400, "too_many_inputs", message, param=param)


def build_http(api: Api) -> FastAPI:
    """The routes of `api` as an ASGI application."""
    # The interactive pages would load scripts from elsewhere.
    http = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(http)
    http.add_middleware(CheckedHead, is_local=lambda: api.is_local)
    http.add_middleware(BodyFromHead)

    def route(path: str, method: str, handler: Handler) -> None:
        name = path.replace("{model:path}", "{model}")

        async def answer(request: Request) -> Response:
            return await api.gate.run(request, name, handler)

        # Not `add_api_route`: endpoints read their requests themselves, without what FastAPI does for each call.
        http.add_route(path, answer, methods=[method])

    route("/v1/chat/completions", "POST", api.chat)
    route("/v1/embeddings", "POST", api.embeddings)
    route("/v1/caption", "POST", api.caption)
    route("/v1/vqa", "POST", api.vqa)
    route("/v1/match", "POST", api.match)
    route("/v1/models", "GET", api.models)
    route("/v1/models/{model:path}", "GET", api.model)
    http.add_api_route("/healthz", api.live, methods=["GET"])
    http.add_api_route("/readyz", api.ready, methods=["GET"])
    http.add_api_route("/openapi.json", document, methods=["GET"])
    add_console(http, max_body_bytes=api.gate.limits.max_body_bytes)
    return http


async def _aside(body: bytes, read: Any) -> Any:
    """Parse a body; a large one in a thread, so that others go on."""
    return read(body) if len(body) < LARGE_BODY_BYTES else await asyncio.to_thread(read, body)


def _is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


def _medium_of(asked: TaskMedia) -> Medium:
    given = {kind: text for kind, text in ((IMAGE, asked.image), (VIDEO, asked.video)) if text is not None}
    if len(given) != 1:
        raise ApiError(400, "invalid_request", "give exactly one of 'image' and 'video'", param=IMAGE)
    [(kind, text)] = given.items()
    return Medium(upload=parse_reference(kind, text, kind), param=kind)


def _encoded(array: NDArray[np.float32], encoding: str) -> list[float] | str:
    flat = np.ascontiguousarray(array, dtype="<f4").ravel()
    return base64.b64encode(flat.tobytes()).decode() if encoding == "base64" else [float(x) for x in flat]
