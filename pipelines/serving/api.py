"""The HTTP interface: routes, limits and deadlines. Which process captions is the caller's choice."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from fastapi import FastAPI, Request

from pipelines.serving.config import ServingConfig
from pipelines.serving.decoding import DecodePool
from pipelines.serving.errors import ApiError, add_error_handlers
from pipelines.serving.uploads import parse_upload, read_body

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1


class CaptionBackend(Protocol):
    """Whoever turns pixels into a caption; failures that may pass are `ApiError`s with status 503."""

    async def caption(self, pixels: np.ndarray) -> str:
        """Caption uint8 [T, 3, H, W]."""

    async def ping(self) -> None:
        """Return when the model can answer."""


class CaptionService:
    """One caption request from body to answer, within the limits of the config."""

    def __init__(self, config: ServingConfig, backend: CaptionBackend) -> None:
        self._config = config
        self._backend = backend
        self._decoders = DecodePool(config.decode, config.decode_threads)
        self._num_in_work = 0

    async def caption(self, request: Request) -> dict[str, str | int]:
        """Answer POST /v1/caption.

        Raises:
            ApiError: For everything that is not a caption.
        """
        with self._admitted():
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    return await self._answer(request)
            except TimeoutError:
                message = f"the request took longer than {self._config.request_timeout_s:g} s"
                raise ApiError(504, "timeout", message, RETRY_AFTER_S) from None
            except ApiError:
                raise
            except Exception:
                # The client learns nothing of our insides; the log does.
                logger.exception("a caption request failed")
                raise ApiError(500, "internal", "the server failed on this request") from None

    async def health(self) -> dict[str, str]:
        """Answer GET /healthz: the model must answer, not only this process.

        Raises:
            ApiError: 503 while no model replica answers.
        """
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._backend.ping()
        except Exception as error:
            logger.warning("health check failed: %r", error)
            raise ApiError(503, "unavailable", "no model replica answers yet", RETRY_AFTER_S) from None
        return {"status": "ok", "model": self._config.model_name}

    async def _answer(self, request: Request) -> dict[str, str | int]:
        length = request.headers.get("content-length")
        body = await read_body(request.stream(), length, self._config.max_body_bytes)
        upload = parse_upload(request.headers.get("content-type"), body)
        pixels = await self._decoders.decode(upload)
        caption = await self._backend.caption(pixels)
        return {
            "caption": caption,
            "kind": upload.kind,
            "num_frames": len(pixels),
            "model": self._config.model_name,
        }

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Hold one of the places; counted without a lock, as all requests share one event loop."""
        if self._num_in_work >= self._config.max_concurrent_requests:
            raise ApiError(503, "overloaded", "too many requests in work; try again", RETRY_AFTER_S)
        self._num_in_work += 1
        try:
            yield
        finally:
            self._num_in_work -= 1


def build_http(service: CaptionService) -> FastAPI:
    """The routes of `service` as an ASGI application."""
    # The interactive pages would load scripts from elsewhere.
    http = FastAPI(title="Q-Former captions", docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(http)
    http.add_api_route("/v1/caption", service.caption, methods=["POST"])
    http.add_api_route("/healthz", service.health, methods=["GET"])
    return http
