"""Errors of the HTTP interface, in OpenAI's shape: `{"error": {message, type, param, code}}`."""

import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger("ray.serve")
"""Logger of Ray Serve, which writes to the replica's own log file."""

RETRY_AFTER_S = 1
# Statuses that routing gives; all others come from `ApiError`.
_ROUTING_CODES = {404: "not_found", 405: "method_not_allowed"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer as a plain value, which crosses processes without the stack trace that an exception would log."""

    status: int
    """HTTP status code."""
    code: str
    """Stable machine-readable code."""
    message: str
    """One line for a person: what is wrong and what to change."""
    param: str | None = None
    """Field of the request that is wrong, such as `messages[0].content[1].image_url`."""
    retry_after_s: int | None = None
    """Value of the `Retry-After` header; set when the same request may succeed later."""

    def body(self) -> dict[str, Any]:
        """JSON body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ApiError(Exception):
    """A refusal as an exception; its message is shown to the client.

    The arguments are the fields of `Refusal`.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, code, message, param, retry_after_s)

    @classmethod
    def of(cls, refusal: Refusal, param: str | None = None) -> "ApiError":
        """Build the error of a refusal, optionally with the field of this request that caused it."""
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
        """Machine-readable code."""
        return self.refusal.code


def unavailable(message: str = "the model is not available; try again") -> ApiError:
    """503 with `Retry-After`."""
    return ApiError(503, "unavailable", message, retry_after_s=RETRY_AFTER_S)


def internal_error() -> ApiError:
    """500 without details, which are in the log alone."""
    return ApiError(500, "internal", "the server failed on this request; its log says why")


def error_response(refusal: Refusal) -> JSONResponse:
    """HTTP response of a refusal."""
    extra = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    if refusal.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=extra)


def refuse_and_log(request: Request, refusal: Refusal) -> JSONResponse:
    """Answer and log a request that reaches no endpoint."""
    fields = {
        "method": request.method,
        "path": request.scope["path"][:200],
        "client": request.client and request.client.host,
    }
    logger.info("refused", extra={**fields, "status": refusal.status, "error": refusal.code})
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
        response = refuse_and_log(request, Refusal(error.status_code, code, message))
        response.headers.update(error.headers or {})
        return response

    http.add_exception_handler(ApiError, refuse)
    http.add_exception_handler(HTTPException, refuse_route)
