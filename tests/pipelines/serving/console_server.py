"""The console before a model that answers at once: the real page, and a chat endpoint told what to say."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from pipelines.serving.http.console_files import add_console

MODELS = ("demo/step-00003000", "birds", "clips")
MAX_BODY_BYTES = 2_000_000


class ToyServer:
    """Answers what it is told, and keeps the requests that came in."""

    def __init__(self) -> None:
        self.reset()
        self.http = FastAPI()
        add_console(self.http, max_body_bytes=MAX_BODY_BYTES)
        self.http.add_api_route("/v1/models", self._models)
        self.http.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])

    def reset(self) -> None:
        """Friendly again."""
        self.words = ["A ", "small ", "red ", "circle."]
        self.pause_s = 0.0
        self.holds_after: int | None = None  # pieces, until released
        self.released = threading.Event()
        self.key = None
        self.refusal: tuple[int, str, dict[str, str]] | None = None
        self.breaks_after: int | None = None  # pieces
        self.fails_after: int | None = None
        self.ends_after: int | None = None
        self.finish = "stop"
        self.requests: list[dict] = []
        self.num_gone = 0

    def _unauthorized(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error(401, "no such API key")

    async def _models(self, request: Request) -> object:
        return self._unauthorized(request) or {"object": "list", "data": [{"id": name} for name in MODELS]}

    async def _chat(self, request: Request) -> object:
        if refused := self._unauthorized(request):
            return refused
        self.requests.append(await request.json())
        if self.refusal is not None:
            return error(*self.refusal)
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self):
        try:
            yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for place, word in enumerate(self.words):
                if place == self.breaks_after:
                    raise ConnectionResetError
                if place == self.ends_after:
                    return
                if place == self.fails_after:
                    yield event({"error": {"message": "the model failed on this request", "type": "server_error"}})
                    return
                await asyncio.sleep(self.pause_s)
                while place == self.holds_after and not self.released.is_set():
                    await asyncio.sleep(0.01)
                yield event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
            yield event({"choices": [], "usage": {"completion_tokens": len(self.words)}})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_gone += 1
            raise


def event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)


@contextlib.contextmanager
def listening(http: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve on loopback for the length of a `with` block; yields the address."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(http, log_level="critical", timeout_graceful_shutdown=0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
