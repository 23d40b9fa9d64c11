"""Errors of the HTTP interface: an answer that is no success is OpenAI's `{"error": {message, type, param, code}}`."""

import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger("ray.serve")
"""As `records.logger`."""

RETRY_AFTER_S = 1
# What routing itself refuses; all other statuses come from `ApiError`.
_ROUTING_CODES = {404: "not_found", 405: "method_not_allowed"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told; crosses processes as a value, where an exception would be a stack trace in a log."""

    status: int
    """HTTP status code."""
    code: str
    """Stable machine-readable word."""
    message: str
    """One line for a person that says what to change."""
    param: str | None = None
    """The field of the request that is wrong, as `messages[0].content[1].image_url`."""
    retry_after_s: int | None = None
    """Sent as `Retry-After` when the same request may succeed later."""

    def body(self) -> dict[str, Any]:
        """The JSON answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ApiError(Exception):
    """A refusal that the client may read; arguments as `Refusal`."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, code, message, param, retry_after_s)

    @classmethod
    def of(cls, refusal: Refusal, param: str | None = None) -> "ApiError":
        """Raise what another process refused, at a place of this request."""
        return cls(
            refusal.status,
            refusal.code,
            refusal.message,
            param=param or refusal.param,
            retry_after_s=refusal.retry_after_s,
        )

    @property
    def status(self) -> int:
        """HTTP status code."""
        return self.refusal.status

    @property
    def code(self) -> str:
        """Machine-readable word."""
        return self.refusal.code


def unavailable(message: str = "the model is not available; try again") -> ApiError:
    """503 with `Retry-After`."""
    return ApiError(503, "unavailable", message, retry_after_s=RETRY_AFTER_S)


def internal_error() -> ApiError:
    """500: the client learns nothing of our insides; the log does."""
    return ApiError(500, "internal", "the server failed on this request; its log says why")


def error_response(refusal: Refusal) -> JSONResponse:
    """The one shape of an error answer."""
    extra = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    if refusal.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=extra)


def turned_away(request: Request, refusal: Refusal) -> JSONResponse:
    """Answer a request that no endpoint sees, and tell of it as endpoints do of theirs."""
    told = {
        "method": request.method,
        "path": request.scope["path"][:200],
        "client": request.client and request.client.host,
    }
    logger.info("refused", extra={**told, "status": refusal.status, "error": refusal.code})
    return error_response(refusal)


def add_error_handlers(http: FastAPI) -> None:
    """Make `http` answer its own errors and those of routing as JSON."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error.refusal)

    async def refuse_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = _ROUTING_CODES.get(error.status_code, "http_error")
        message = f"{request.method} {request.scope['path'][:200]}: {error.detail}; /openapi.json lists what there is"
        response = turned_away(request, Refusal(error.status_code, code, message))
        response.headers.update(error.headers or {})
        return response

    http.add_exception_handler(ApiError, refuse)
    http.add_exception_handler(HTTPException, refuse_route)
