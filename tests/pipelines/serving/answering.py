"""The HTTP layer over models that answer at once, or as they are told; real decoders."""

import asyncio
import contextlib

import httpx
import numpy as np

from pipelines.data.media.samples import Limits
from pipelines.serving.app.quotas import Quotas
from pipelines.serving.contract.adapters import Adapter, Backbones, SharedEncoder, SharedLanguage
from pipelines.serving.contract.config import FetchPolicy, RequestLimits, ServingConfig
from pipelines.serving.contract.errors import ApiError, Refusal
from pipelines.serving.contract.wire import MatchScore, Piece, TextEmbeddings
from pipelines.serving.http.api import Api, build_http
from pipelines.serving.workers.media import MediaWorker
from qformer.config import LanguageSpec, VisionSpec
from qformer.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    height=32, width=32, resize_short_side=32, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
EMBED_DIM, NUM_QUERIES, WIDTH = 8, 4, 16
# So many children that no event loop ever waits for one; their starts are most of a test's time.
MEDIA = MediaWorker(Limits(max_pixels=10_000_000, video_timeout_s=20.0), FetchPolicy(), 32)
WORDS = ("a ", "red ", "ball")


def adapter(name="demo", stage=2, **changes):
    values = {
        "name": name,
        "version": f"{name}/step-00000003",
        "folder": f"/nowhere/{name}",
        "stage": stage,
        "prompt": "a photo of",
        "preprocessing": PREPROCESSING,
        "num_frames": 4,
        "sampling": {},
        "audio_sampling": None,
        "num_queries": NUM_QUERIES,
        "embed_dim": EMBED_DIM,
        "encoder": SharedEncoder(vision=VisionSpec("vit"), width=48),
        "language": SharedLanguage(language=LanguageSpec("opt"), answer_end_id=None) if stage == 2 else None,
        "has_lora": False,
    }
    return Adapter(**values | changes)


class Models:
    """Answers "a red ball"; keeps what it was asked."""

    def __init__(self, *, delay_s=0.0, error=None, breaks_after=None, limits=None):
        self.delay_s, self.error, self.breaks_after = delay_s, error, breaks_after
        self.prompts, self.pixels, self.instructions, self.num_ended = [], [], [], 0
        self.media = MEDIA if limits is None else MediaWorker(limits, FetchPolicy(), 1)
        self.quotas = Quotas(60.0)

    async def decode(self, upload, adapter):
        found = await self.media.decode(upload, adapter)
        if isinstance(found, Refusal):
            raise ApiError.of(found)
        return found

    async def soft_prompts(self, adapter, clip, instruction):
        await self._trouble()
        self.pixels.append(clip.pixels)
        self.instructions.append(instruction)
        return np.full((NUM_QUERIES, WIDTH), clip.pixels.mean(), dtype=np.float32)

    async def embed(self, adapter, clip):
        await self._trouble()
        rows = np.arange(len(clip.pixels) * NUM_QUERIES * EMBED_DIM, dtype=np.float32).reshape(-1, EMBED_DIM) + 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    async def embed_texts(self, adapter, texts):
        return TextEmbeddings(vectors=np.eye(EMBED_DIM, dtype=np.float32)[: len(texts)], num_tokens=3 * len(texts))

    async def match(self, adapter, clip, texts):
        return [MatchScore(probability=1 / (place + 1), similarity=0.5) for place in range(len(texts))]

    async def answer(self, prompt):
        await self._trouble()
        self.prompts.append(prompt)
        text = " ".join(part for part in prompt.segments if isinstance(part, str))
        return Piece(text=f"{text}: {''.join(WORDS)}", finish_reason="stop", prompt_tokens=9, completion_tokens=4)

    async def stream(self, prompt):
        self.prompts.append(prompt)
        try:
            for place, word in enumerate(WORDS):
                if place == self.breaks_after:
                    raise ApiError(503, "unavailable", "the answer was cut off", retry_after_s=1)
                await self._trouble()
                last = "length" if place == len(WORDS) - 1 else None
                yield Piece(text=word, finish_reason=last, prompt_tokens=9, completion_tokens=place + 1)
        finally:
            self.num_ended += 1

    async def take_quota(self, key):
        found = self.quotas.take(key)
        if isinstance(found, Refusal):
            raise ApiError.of(found)
        return found

    async def give_quota(self, key, lease):
        self.quotas.give_back(key, lease)

    async def _trouble(self):
        await asyncio.sleep(self.delay_s)
        if self.error:
            raise self.error


def api(models, *, adapters=None, keys=(), is_local=False, **limits):
    config = ServingConfig(
        backbones=Backbones.of([adapter()]),
        is_local=is_local,
        requests=RequestLimits(**{"max_body_bytes": 200_000, **limits}),
    )
    served = Api(config, models)
    served.update(adapters or [adapter(), adapter("search", stage=1)], keys)
    return served


@contextlib.asynccontextmanager
async def client(models, **options):
    transport = httpx.ASGITransport(build_http(api(models, **options)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
        yield session


def post(models, path, *, headers=None, content=None, json=None, **options):
    async def ask():
        async with client(models, **options) as session:
            return await session.post(path, headers=headers, content=content, json=json)

    return asyncio.run(ask())
