"""The endpoints and their routes, over `Models`: the caller decides in which processes the models run."""

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
    SamplingRequest,
    TaskMedia,
    TextPart,
    VqaRequest,
    parse_request,
)
from pipelines.serving.contract.uploads import parse_raw, parse_reference
from pipelines.serving.http.admission import Admission, Handler, RequestContext, StreamedAnswer
from pipelines.serving.http.bodies import is_json, parse_json, parse_off_loop, read_body
from pipelines.serving.http.body_transfer import ReplicaBodyMiddleware
from pipelines.serving.http.chat import MediaInput, answer_settings, read_conversation, require_short, single_turn
from pipelines.serving.http.console_files import add_console
from pipelines.serving.http.headers import HeaderCheck
from pipelines.serving.http.health import ReadinessProbe
from pipelines.serving.http.keys import KeyTable
from pipelines.serving.http.records import RequestReporter
from pipelines.serving.http.request_models import RequestModels, gather, mean_pool
from pipelines.serving.http.sse import chat_completion, close_with, events, usage
from pipelines.serving.workers.graph import Models


class Api:
    """The endpoints.

    Args:
        config: Settings of the service.
        models: Interface to the models.
    """

    def __init__(self, config: ServingConfig, models: Models) -> None:
        self._config, self._models, self._limits = config, models, config.requests
        self.admission = Admission(config.requests, models, RequestReporter())
        self._adapters: AdapterTable | None = None
        self._probe = ReadinessProbe(models)
        self.is_local = config.is_local
        """Whether `Host` must be a loopback name (`headers.check_headers`)."""
        self._started_s = int(time.time())

    def update(self, adapters: Sequence[Adapter], keys: Sequence[ApiKey]) -> None:
        """Replace adapters and keys, from the next request on."""
        self._probe = ReadinessProbe(self._models)  # results of the old adapters say nothing about the new ones
        self._adapters, self.admission.keys = AdapterTable(adapters), KeyTable(keys)
        self.is_local = self._config.is_local and not keys

    @property
    def adapters(self) -> AdapterTable:
        """Adapters that are served now."""
        assert self._adapters is not None, "update() comes first"
        return self._adapters

    async def chat(self, request: Request, context: RequestContext) -> Any:
        """POST /v1/chat/completions."""
        body = await self._body(request, context)
        parsed, conversation, adapter = await parse_off_loop(body, self._read_chat)
        settings = answer_settings(parsed, self._config.generation, self._limits)
        prompt = await RequestModels(self._models, context).prompt(conversation, adapter, settings)
        record, model = context.record, adapter.version
        if not parsed.stream:
            piece = await self._models.answer(prompt)
            record.prompt_tokens, record.completion_tokens = piece.prompt_tokens, piece.completion_tokens
            return chat_completion(context, model, piece)
        record.is_streamed = True
        pieces = self._models.stream(prompt)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        record.first_token()
        with_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
        stack = close_with(pieces, context.detach_stack())
        return StreamedAnswer(events(context, model, first, pieces, with_usage=with_usage), stack)

    def _read_chat(self, body: bytes) -> Any:
        parsed = parse_request(ChatRequest, parse_json(body))
        if parsed.stream_options is not None and not parsed.stream:
            message = "stream_options is for streams; set stream: true or leave it out"
            raise ApiError(400, "invalid_request", message, param="stream_options")
        adapter = self.adapters.find(parsed.model, generates=True)
        return parsed, read_conversation(parsed.messages, adapter.prompt, self._limits), adapter

    async def caption(self, request: Request, context: RequestContext) -> Any:
        """POST /v1/caption."""
        return await self._task(request, context, CaptionRequest, "caption")

    async def vqa(self, request: Request, context: RequestContext) -> Any:
        """POST /v1/vqa."""
        return await self._task(request, context, VqaRequest, "answer")

    async def _task(
        self, request: Request, context: RequestContext, schema: type[CaptionRequest] | type[VqaRequest], name: str
    ) -> Any:
        body = await self._body(request, context, needs_json=schema is VqaRequest)

        def read(body: bytes) -> tuple[SamplingRequest, MediaInput]:
            if schema is CaptionRequest and not is_json(request.headers):
                return SamplingRequest(), MediaInput(
                    upload=parse_raw(request.headers.get("content-type"), body), param=None
                )
            parsed = parse_request(schema, parse_json(body))
            return parsed, _media_input(parsed)

        parsed, medium = await parse_off_loop(body, read)
        adapter = self.adapters.find(parsed.model, generates=True)
        text = parsed.question.strip() if isinstance(parsed, VqaRequest) else ""
        require_short([text], self._limits, "question")
        conversation = single_turn(medium.upload, text or adapter.prompt, medium.param)
        settings = answer_settings(parsed, self._config.generation, self._limits)
        prompt = await RequestModels(self._models, context).prompt(conversation, adapter, settings)
        piece = await self._models.answer(prompt)
        record = context.record
        record.prompt_tokens, record.completion_tokens = piece.prompt_tokens, piece.completion_tokens
        return {
            name: piece.text,
            "kind": medium.upload.kind,
            "num_frames": record.num_frames,
            "model": adapter.version,
        }

    async def match(self, request: Request, context: RequestContext) -> Any:
        """POST /v1/match."""

        def read(body: bytes) -> tuple[MatchRequest, MediaInput]:
            parsed = parse_request(MatchRequest, parse_json(body))
            return parsed, _media_input(parsed)

        parsed, medium = await parse_off_loop(await self._body(request, context), read)
        self._require_few(parsed.texts, "texts")
        require_short(parsed.texts, self._limits, "texts")
        context.record.adapter = adapter = self.adapters.find(parsed.model, generates=False)
        decoded = await RequestModels(self._models, context).decode(medium, adapter)
        matched = await self._models.match(adapter, decoded, parsed.texts)
        return {
            "scores": [{"probability": one.probability, "similarity": one.similarity} for one in matched],
            "kind": medium.upload.kind,
            "num_frames": len(decoded.pixels),
            "model": adapter.version,
        }

    async def embeddings(self, request: Request, context: RequestContext) -> Any:
        """POST /v1/embeddings."""
        parsed, inputs = await parse_off_loop(await self._body(request, context), self._read_embedding)
        context.record.adapter = adapter = self.adapters.find(parsed.model, generates=False)
        work = RequestModels(self._models, context)
        texts = [one for one in inputs if isinstance(one, str)]
        media = [one for one in inputs if isinstance(one, MediaInput)]
        queries = await gather([work.embed(medium, adapter) for medium in media]) if media else []
        found = await self._models.embed_texts(adapter, texts) if texts else None
        rows, vectors = iter(queries), iter(() if found is None else found.vectors)
        data: list[dict[str, Any]] = []
        for index, one in enumerate(inputs):
            array = next(vectors) if isinstance(one, str) else next(rows)
            if array.ndim == 2 and parsed.pooling == "mean":
                array = mean_pool(array)
            encoded = _encoded(array, parsed.encoding_format)
            data.append({"object": "embedding", "index": index, "embedding": encoded, "shape": list(array.shape)})
        context.record.prompt_tokens = (found.num_tokens if found else 0) + sum(map(len, queries))
        return {
            "object": "list",
            "data": data,
            "model": adapter.version,
            "usage": {name: n for name, n in usage(context.record.prompt_tokens).items() if name[0] != "c"},
        }

    def _read_embedding(self, body: bytes) -> tuple[EmbeddingRequest, list[str | MediaInput]]:
        parsed = parse_request(EmbeddingRequest, parse_json(body))
        parts = [parsed.input] if isinstance(parsed.input, str) else parsed.input
        self._require_few(parts, "input")
        inputs: list[str | MediaInput] = []
        for index, part in enumerate(parts):
            if isinstance(part, str | TextPart):
                inputs.append(part if isinstance(part, str) else part.text)
                continue
            kind, url = (IMAGE, part.image_url) if isinstance(part, ImagePart) else (VIDEO, part.video_url)
            param = f"input[{index}].{kind}_url.url"
            inputs.append(MediaInput(upload=parse_reference(kind, url.url, param), param=param))
        texts = [one for one in inputs if isinstance(one, str)]
        if not all(text.strip() for text in texts):
            raise ApiError(400, "invalid_request", "an input is empty; give it a text", param="input")
        require_short(texts, self._limits, "input")
        if len(inputs) - len(texts) > self._limits.max_media:
            message = f"more than {self._limits.max_media} images and videos; send fewer at a time"
            raise ApiError(400, "too_many_media", message, param="input")
        return parsed, inputs

    async def models(self, request: Request, context: RequestContext) -> Any:
        """GET /v1/models."""
        return {"object": "list", "data": [self._described(adapter) for adapter in self.adapters.all]}

    async def model(self, request: Request, context: RequestContext) -> Any:
        """GET /v1/models/{model}."""
        name = request.path_params["model"]
        for adapter in self.adapters.all:
            if name in (adapter.name, adapter.version):
                return self._described(adapter)
        message = f"the model {name[:100]!r} does not exist; GET /v1/models lists all"
        raise ApiError(404, "model_not_found", message, param="model")

    async def live(self, request: Request) -> Any:
        """GET /healthz: the process is alive."""
        return {"status": "ok", "model": self.adapters.default.version}

    async def ready(self, request: Request) -> Any:
        """GET /readyz: the models answer a test picture, for one adapter of each stage."""
        await self._probe.check(self.adapters)
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

    async def _body(self, request: Request, context: RequestContext, *, needs_json: bool = True) -> bytes:
        if needs_json and not is_json(request.headers):
            # This also stops pages of other sites: without CORS, browsers let them send other content types only.
            declared = request.headers.get("content-type", "")[:80]
            message = f"Content-Type is {declared!r}; send JSON as application/json"
            raise ApiError(415, "unsupported_media_type", message)
        body = await read_body(request.stream(), request.headers.get("content-length"), self._limits)
        context.record.body_bytes = len(body)
        context.record.finish_stage("received")
        return body

    def _require_few(self, inputs: Sequence[Any], param: str) -> None:
        if len(inputs) > self._limits.max_embedding_inputs:
            message = f"{len(inputs)} entries exceed the limit of {self._limits.max_embedding_inputs}; send fewer"
            raise ApiError(400, "too_many_inputs", message, param=param)


def build_http(api: Api) -> FastAPI:
    """Build the ASGI application with the routes of `api`."""
    # The interactive pages of FastAPI load scripts from other hosts.
    http = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(http)
    http.add_middleware(HeaderCheck, is_local=lambda: api.is_local)
    http.add_middleware(ReplicaBodyMiddleware)

    def route(path: str, method: str, handler: Handler) -> None:
        name = path.replace("{model:path}", "{model}")

        async def answer(request: Request) -> Response:
            return await api.admission.run(request, name, handler)

        # Not `add_api_route`: endpoints parse their requests themselves and save FastAPI's work per call.
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
    add_console(http, max_body_bytes=api.admission.limits.max_body_bytes)
    return http


def _media_input(parsed: TaskMedia) -> MediaInput:
    given = {kind: text for kind, text in ((IMAGE, parsed.image), (VIDEO, parsed.video)) if text is not None}
    if len(given) != 1:
        raise ApiError(400, "invalid_request", "give exactly one of 'image' and 'video'", param=IMAGE)
    [(kind, text)] = given.items()
    return MediaInput(upload=parse_reference(kind, text, kind), param=kind)


def _encoded(array: NDArray[np.float32], encoding: str) -> list[float] | str:
    flat = np.ascontiguousarray(array, dtype="<f4").ravel()
    return base64.b64encode(flat.tobytes()).decode() if encoding == "base64" else [float(x) for x in flat]
