"""The web page at `/`: static files with strict security headers."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

FOLDER = Path(__file__).parents[1] / "console"
PAGE = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# No other hosts, nothing inline, no text parsed as markup (trusted types forbid innerHTML and similar); previews of the
# user's own files are blob: URLs.
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob:",
    "media-src blob:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Revalidated at each load (304 while unchanged), so a page never runs with scripts of another release.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class ConsoleFile:
    """One file with its response headers."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> "ConsoleFile":
        """Read a file."""
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def respond(self, request: Request) -> Response:
        """Respond with the file, or with 304 if the client has it."""
        headers = {**HEADERS, "ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {self.etag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def add_console(http: FastAPI, *, max_body_bytes: int) -> None:
    """Serve the page at `/` and its files at `/console/NAME`, without an API key.

    The files are read once, here, so a request can reach no other file. The page calls the endpoints under `v1/`.

    Args:
        http: Application that gets the routes; the OpenAPI document does not list them.
        max_body_bytes: Size limit of a request body; the page checks files against it before it sends them.
    """
    files = {path.name: ConsoleFile.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}

    def serve(route: str, file: ConsoleFile) -> None:
        async def respond(request: Request) -> Response:
            return file.respond(request)

        http.add_api_route(route, respond, methods=["GET", "HEAD"], include_in_schema=False)

    async def limits() -> JSONResponse:
        return JSONResponse({"max_body_bytes": max_body_bytes}, headers=HEADERS)

    serve("/", files[PAGE])
    for name, file in files.items():
        if name != PAGE:
            serve(f"/console/{name}", file)
    http.add_api_route("/console/limits.json", limits, methods=["GET"], include_in_schema=False)
