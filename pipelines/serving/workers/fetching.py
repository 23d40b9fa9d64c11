"""Remote media: only from hosts that the operator names, only from public addresses, within limits of size and time.

A name is resolved once, when the connection is made. Every address is checked, and the connection goes to a checked
one, so DNS rebinding (a name that resolves differently a moment later) has no effect. Redirects are followed here one
by one, each through the same checks. Proxies and credentials of the environment are not used.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from pipelines.serving.contract.config import FetchPolicy
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.workers.addresses import is_public

MAX_URL_CHARACTERS = 2048
_PORTS = {"https": 443, "http": 80}
_REDIRECTS = (301, 302, 303, 307, 308)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Function from host and port to addresses."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """Resolve a host with the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class _NotPublicError(Exception):
    """An address outside the public internet."""


class PublicBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only.

    Args:
        inner: Backend that connects; it gets addresses, never names.
        resolver: Name resolution.
    """

    def __init__(self, inner: httpcore.AsyncNetworkBackend, resolver: Resolve) -> None:
        self._inner, self._resolve = inner, resolver

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a host; a name with any address that is not public is an error."""
        addresses = await self._resolve(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise _NotPublicError
        return await self._inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        """Refuse: Unix sockets are local."""
        raise _NotPublicError

    async def sleep(self, seconds: float) -> None:
        """Sleep, as httpcore's interface wants."""
        await self._inner.sleep(seconds)


class Fetcher:
    """Fetches media by URL.

    Args:
        policy: Allowed hosts and limits.
        resolver: Name resolution.
        network: Backend that connects; None: sockets.
    """

    def __init__(
        self, policy: FetchPolicy, resolver: Resolve = resolve, network: httpcore.AsyncNetworkBackend | None = None
    ) -> None:
        self._policy = policy
        self._backend = PublicBackend(network or httpcore.AnyIOBackend(), resolver)

    def check(self, url: str) -> SplitResult:
        """Check that a URL may be fetched.

        Raises:
            ApiError: 400 if it is no http(s) URL, 403 if its host is not allowed.
        """
        # Before parsing: `urlsplit` caches its arguments.
        if len(url) > MAX_URL_CHARACTERS or not (url.isascii() and url.isprintable()) or " " in url:
            message = f"give a URL of at most {MAX_URL_CHARACTERS} printable ASCII characters, others as %XX"
            raise ApiError(400, "invalid_url", message)
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").removesuffix(".").lower(), parts.port
        except ValueError:
            raise _unreadable() from None
        schemes = ("https", "http") if self._policy.allow_http else ("https",)
        if parts.scheme not in schemes:
            wanted = " or ".join(f"{scheme}:" for scheme in schemes)
            message = f"this server fetches no {parts.scheme[:20] or 'bare'!r} URLs; use {wanted}, or send the bytes "
            raise ApiError(400, "invalid_url", message + "as data:image/jpeg;base64,…")
        if not host or parts.username is not None or parts.password is not None:
            raise ApiError(400, "invalid_url", "the URL must name a host, and no user or password")
        if port not in (None, _PORTS[parts.scheme]):
            raise ApiError(403, "url_not_allowed", "only the usual ports (443, 80) are fetched from; send the bytes")
        if not any(_covers(allowed, host) for allowed in self._policy.hosts):
            message = "the URL's host is not among those that this server fetches from; send the bytes as a data: URL"
            raise ApiError(403, "url_not_allowed", message)
        return parts

    async def fetch(self, url: str) -> bytes:
        """Fetch the content of `url`.

        Raises:
            ApiError: 400 or 403 if the URL, a redirect or an address is not allowed; 422 if the content is too large,
                too slow or unavailable.
        """
        policy = self._policy
        try:
            async with (
                asyncio.timeout(policy.timeout_s),
                httpcore.AsyncConnectionPool(network_backend=self._backend) as pool,
            ):
                for _ in range(policy.max_redirects + 1):
                    answer = await self._get(pool, url)
                    if isinstance(answer, bytes):
                        return answer
                    url = urljoin(url, answer)
        except TimeoutError:
            message = f"fetching the URL took longer than {policy.timeout_s:g} s; send the bytes"
            raise ApiError(422, "url_unreachable", message) from None
        except _NotPublicError:
            message = "the URL's host has no public address; send the bytes as a data: URL"
            raise ApiError(403, "url_not_allowed", message) from None
        except ValueError:  # an invalid redirect target, or a name that the resolver rejects
            raise _unreadable() from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            message = f"the URL could not be fetched ({type(error).__name__}); check it, or send the bytes"
            raise ApiError(422, "url_unreachable", message) from None
        message = f"the URL redirects more than {policy.max_redirects} times; give the final one"
        raise ApiError(422, "url_unreachable", message)

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str) -> bytes | str:
        """Fetch the content, as bytes, or the target of a redirect, as text."""
        parts = self.check(url)
        target = httpcore.URL(parts._replace(fragment="").geturl())
        headers = [("Host", parts.hostname or ""), ("Accept", "image/*, video/*"), ("Accept-Encoding", "identity")]
        async with pool.stream("GET", target, headers=headers) as response:
            if response.status in _REDIRECTS:
                moved = [value for name, value in response.headers if name.lower() == b"location"]
                return moved[0].decode("ascii", "replace") if moved else ""
            if response.status != 200:
                message = f"the URL answers with status {response.status}; check it, or send the bytes"
                raise ApiError(422, "url_unreachable", message)
            chunks, size_bytes = [], 0
            async for chunk in response.aiter_stream():
                size_bytes += len(chunk)
                if size_bytes > self._policy.max_bytes:
                    message = f"the file behind the URL exceeds {self._policy.max_bytes} bytes; use a smaller one"
                    raise ApiError(422, "media_too_large", message)
                chunks.append(chunk)
            return b"".join(chunks)


def _unreadable() -> ApiError:
    return ApiError(400, "invalid_url", "the URL cannot be read; give https://HOST/PATH")


def _covers(allowed: str, host: str) -> bool:
    allowed = allowed.lower()
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed
