"""The console: a page of static files at `/`, with the headers that keep it to itself."""

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

# Nothing from elsewhere, nothing inline, no text that becomes markup (trusted types forbid innerHTML and its kin);
# blob: is what previews of a person's own files are.
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
    # Asked for anew each time, answered with 304 while unchanged: a page never runs with scripts of another release.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class ConsoleFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> "ConsoleFile":
        """Read one file of the console."""
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def answer(self, request: Request) -> Response:
        """The file, or 304 when the client has it already."""
        headers = {**HEADERS, "ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {self.etag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def add_console(http: FastAPI, *, max_body_bytes: int) -> None:
    """Answer `/` with the page and `/console/NAME` with its files; all of them need no API key.

    The files are read once, here: a request can name none but these. The page talks to the interface beside it, under
    `v1/`.

    Args:
        http: The application; gets routes that its OpenAPI page does not list.
        max_body_bytes: What one request may carry, so that the page can refuse a file before it is sent.
    """
    files = {path.name: ConsoleFile.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}

    def serve(route: str, file: ConsoleFile) -> None:
        async def answer(request: Request) -> Response:
            return file.answer(request)

        http.add_api_route(route, answer, methods=["GET", "HEAD"], include_in_schema=False)

    async def limits() -> JSONResponse:
        return JSONResponse({"max_body_bytes": max_body_bytes}, headers=HEADERS)

    serve("/", files[PAGE])
    for name, file in files.items():
        if name != PAGE:
            serve(f"/console/{name}", file)
    http.add_api_route("/console/limits.json", limits, methods=["GET"], include_in_schema=False)
