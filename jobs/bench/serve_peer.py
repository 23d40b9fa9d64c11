"""Peers of the serving benchmark: a simple HTTP server, and the engine without HTTP.

`NaiveServer` is the usual loop: `transformers` generates one answer after the other. It uses the same proxy of Ray
Serve and FastAPI as ours, with decoding, encoder, bridge and language model in the HTTP process, and one lock as its
queue. `DirectModel` calls our engine as a library.
"""

import asyncio
import base64
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from ray import serve

from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.inference.models import Captioner, load_captioner
from qformer.config import GenerationSettings
from qformer.generation.completion import complete
from qformer.generation.engine import Engine
from qformer.generation.requests.inputs import segment_inputs
from qformer.generation.requests.request import EngineRequest, RequestSettings


class NaiveServer:
    """A `transformers` loop behind HTTP, one request at a time.

    Args:
        checkpoint: Folder of a stage-2 checkpoint.
    """

    def __init__(self, checkpoint: str) -> None:
        self._captioner = load_captioner(Path(checkpoint))
        self._decoder = decoder_of(self._captioner)
        self._one_at_a_time = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the ASGI application; Ray Serve calls this in the replica."""
        http = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        http.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        return http

    async def chat(self, request: Request) -> dict[str, Any]:
        """Answer one question about one picture."""
        body = await request.json()
        async with self._one_at_a_time:
            text = await asyncio.to_thread(self._answer, body)
        message = {"role": "assistant", "content": text}
        usage = {"completion_tokens": body["max_tokens"]}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "length"}], "usage": usage}

    def _answer(self, body: dict[str, Any]) -> str:
        image, text = body["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        pixels = torch.from_numpy(self._decoder.decode(kind="image", data=data).pixels)[None]
        settings = GenerationSettings(max_new_tokens=body["max_tokens"])
        return self._captioner.answer(pixels, [text["text"]], settings)[0]


def naive_app(checkpoint: Path) -> serve.Application:
    """Application of `NaiveServer` for `serve.run`, with a long queue."""
    deployment = serve.deployment(serve.ingress()(NaiveServer)).options(
        name="Naive", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1}
    )
    return deployment.bind(str(checkpoint))


class DirectModel:
    """The decoder, encoder, bridge and engine of the service, called in this process.

    Args:
        checkpoint: Folder of a stage-2 checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._captioner = load_captioner(checkpoint)
        self._decoder = decoder_of(self._captioner)
        self._engine = Engine(self._captioner.language, kv_tokens=4096, max_requests=1)

    @torch.inference_mode()
    def answer(self, image: bytes, question: str, num_tokens: int) -> str:
        """Generate a greedy answer of exactly `num_tokens` tokens."""
        captioner = self._captioner
        pixels = torch.from_numpy(self._decoder.decode(kind="image", data=image).pixels)[None]
        [prompts_NL] = captioner.stage2(captioner.encoder.features(pixels)).rows()
        request = EngineRequest(
            inputs_SL=segment_inputs(captioner.language, [prompts_NL, question]),
            settings=RequestSettings(max_new_tokens=num_tokens),
            is_streamed=False,
        )
        [answer] = complete(self._engine, [request])
        if isinstance(answer, Exception):
            raise answer
        return answer.text


def decoder_of(captioner: Captioner) -> SampleDecoder:
    """Decoder with the captioner's settings of training, in this process."""
    return SampleDecoder(DecodeSettings(preprocessing=captioner.preprocessing, num_frames=captioner.num_frames))
