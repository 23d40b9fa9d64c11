"""A replica of the encoder in this process, over a tiny checkpoint."""

import asyncio

import numpy as np
import pytest
import torch

from pipelines.inference.models import load_retriever
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.wire import DecodedMedia
from pipelines.serving.workers.adapter_models import RetrievalAdapter
from pipelines.serving.workers.encoder import EncoderWorker
from qformer.conversion.checkpoint import read_info
from tests.tiny_checkpoints import WORDS, write_stage1

TEXTS = [" ".join(WORDS[start : start + 1 + start % 3]) for start in range(7)]


class Worker(EncoderWorker):
    """Without Serve's memory of adapters."""

    async def adapter(self, key):
        return await self.load(key)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_stage1(tmp_path_factory.mktemp("runs") / "search")


def test_many_texts_are_matched_part_by_part(checkpoint, monkeypatch):
    """A pass has at most so many frames, each counted for every text; the scores are those of all texts together."""
    adapter = Adapter.of(read_info(checkpoint), name="search", version="search/1", folder=str(checkpoint))
    worker = Worker(adapter.encoder, max_batch_frames=8, use_gpu=False)
    side = read_info(checkpoint).preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, side.height, side.width), dtype=np.uint8)
    clip = DecodedMedia(pixels=pixels, frame_valid=np.ones(3, dtype=np.bool_), size_bytes=1)
    real, sizes, costs = RetrievalAdapter.match, [], []

    def noted(self, tokens_FPV, is_frame_F, texts):
        sizes.append(len(tokens_FPV) * len(texts))
        return real(self, tokens_FPV, is_frame_F, texts)

    monkeypatch.setattr(RetrievalAdapter, "match", noted)
    submit = worker._batcher.submit
    monkeypatch.setattr(worker._batcher, "submit", lambda work, cost: costs.append(cost) or submit(work, cost))
    scores = asyncio.run(worker.match(adapter, clip, TEXTS))
    assert sizes == [6, 6, 6, 3] and costs == [21]
    retriever = load_retriever(checkpoint)
    tokens = retriever.embed_image(torch.from_numpy(pixels)[None])[1]
    expected = retriever.match(tokens.expand(7, -1, -1, -1), TEXTS)
    np.testing.assert_allclose([score.probability for score in scores], expected, atol=1e-5)
