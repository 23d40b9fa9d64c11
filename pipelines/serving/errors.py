"""Errors of the HTTP interface: every answer that is not a success is `{"error": {"type", "message"}}`."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

# What routing itself refuses; all other statuses come from `ApiError`.
ROUTING_ERRORS = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """A refusal that the client may read.

    Args:
        status: HTTP status code.
        kind: Stable machine-readable word, the answer's `error.type`.
        message: One line for a person.
        retry_after_s: Sent as `Retry-After` when the same request may succeed later.
    """

    def __init__(self, status: int, kind: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.retry_after_s = retry_after_s


def error_response(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The one shape of an error answer."""
    return JSONResponse({"error": {"type": kind, "message": message}}, status_code=status, headers=headers)


def add_error_handlers(http: FastAPI) -> None:
    """Make `http` answer its own errors and those of routing as JSON."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return error_response(error.status, error.kind, error.message, headers)

    async def refuse_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = ROUTING_ERRORS.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(error.status_code, kind, message, dict(error.headers or {}))

    http.add_exception_handler(ApiError, refuse)
    http.add_exception_handler(HTTPException, refuse_route)
