"""What the head of every request must be, before anything is done for it.

A service that nothing but its loopback address keeps from others is asked by a name of this machine. A site may let its
own name lead to 127.0.0.1 (DNS rebinding): to a browser, such a service is then that site's server, and the site's page
may ask it. The browser still sends the site's name.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serving.contract.errors import ApiError, turned_away

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]+)?")
_PROXY_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")
"""By these a client tells Ray Serve's proxy not to watch whether it is still there."""


def is_loopback(name: str) -> bool:
    """Whether a name or an address leads to this machine, whoever asks."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def check_head(headers: Mapping[str, str], *, is_local: bool) -> None:
    """Check a request's headers, named in small letters.

    Args:
        headers: Of the request. One without `Host`, as no browser sends it, is let through.
        is_local: Whether `Host` must be a name of this machine.

    Raises:
        ApiError: 403 for another name, 400 for a header that Ray Serve's proxy should not have seen.
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


class CheckedHead:
    """Comes before every endpoint and page, and before it is known whether there is one.

    Args:
        app: Gets requests that pass `check_head`.
        is_local: See `check_head`; asked at every request.
    """

    def __init__(self, app: ASGIApp, is_local: Callable[[], bool]) -> None:
        self._app, self._is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        app = self._app
        if scope["type"] == "http":
            request = Request(scope)
            try:
                check_head(request.headers, is_local=self._is_local())
            except ApiError as error:
                app = turned_away(request, error.refusal)
        await app(scope, receive, send)
