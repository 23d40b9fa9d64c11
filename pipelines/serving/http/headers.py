"""Checks of the request headers, before any endpoint runs.

A service without API keys listens on loopback only. A website may point its own name to 127.0.0.1 (DNS rebinding): to a
browser, the service is then that site's server, and the site's pages may send requests to it. The browser still sends
the site's name as `Host`, so a local service accepts loopback names only.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serving.contract.errors import ApiError, refuse_and_log

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]+)?")
_PROXY_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")
"""Headers that turn off the disconnect and timeout handling of Ray Serve's proxy."""


def is_loopback(name: str) -> bool:
    """Whether a name or an address is a loopback one."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def check_headers(headers: Mapping[str, str], *, is_local: bool) -> None:
    """Check the headers of a request.

    Args:
        headers: Headers by lower-case name. A request without `Host`, which no browser sends, passes.
        is_local: Whether `Host` must be a loopback name.

    Raises:
        ApiError: 403 for another name, 400 for a header that changes how Ray Serve's proxy treats the request.
    """
    for name in _PROXY_HEADERS:
        if name in headers:
            message = f"the header {name} is not taken: work ends with its client, and with its time; leave it out"
            raise ApiError(400, "invalid_request", message)
    host = headers.get("host")
    if not is_local or host is None:
        return
    found = _HOST.fullmatch(host)
    if found is None or not is_loopback(found[1] or found[2]):
        message = f"Host is {host[:80]!r}, and this server is for its own machine: ask it as localhost or 127.0.0.1; "
        raise ApiError(403, "host_not_allowed", message + "for others set api_keys, or allow_open=true")


class HeaderCheck:
    """ASGI middleware that checks headers before routing.

    Args:
        app: Application for requests that pass `check_headers`.
        is_local: Function that gives `check_headers`' argument for each request.
    """

    def __init__(self, app: ASGIApp, is_local: Callable[[], bool]) -> None:
        self._app, self._is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or refuse it."""
        app = self._app
        if scope["type"] == "http":
            request = Request(scope)
            try:
                check_headers(request.headers, is_local=self._is_local())
            except ApiError as error:
                app = refuse_and_log(request, error.refusal)
        await app(scope, receive, send)
