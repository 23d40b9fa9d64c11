"""Checkpoints of bridges that join frames in use: soft prompts, answers, embeddings and matches of padded clips."""

import pytest
import torch

from pipelines.inference.models import load_captioner, load_retriever
from qformer.config import GenerationSettings
from tests.qformer.bridges.clips import CLOSE, WAYS, bridge
from tests.tiny_checkpoints import write_stage1, write_stage2

IS_FRAME = torch.tensor([[True, False, True, False], [True, True, True, True]])


def pixels(model):
    """Two clips; what the padding of the first shows is another picture each time."""
    size = model.preprocessing.height
    clips = torch.randint(0, 256, (2, 4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    other = clips.clone()
    other[~IS_FRAME] = 255 - other[~IS_FRAME]
    return clips, other


@pytest.mark.parametrize("temporal", WAYS)
def test_a_captioner_reads_the_real_frames(temporal, tmp_path):
    captioner = load_captioner(write_stage2(tmp_path / "two", bridge=bridge(temporal)))
    clips, other = pixels(captioner)
    prompts = captioner.soft_prompts(clips, frame_valid=IS_FRAME)
    assert all(
        one.equal(two) for one, two in zip(prompts, captioner.soft_prompts(other, frame_valid=IS_FRAME), strict=True)
    )
    (alone,) = captioner.soft_prompts(clips[:1, IS_FRAME[0]])
    torch.testing.assert_close(prompts[0], alone, **CLOSE)
    settings = GenerationSettings(max_new_tokens=6)
    answers = captioner.answer(clips, settings=settings, frame_valid=IS_FRAME)
    assert answers[0] == captioner.answer(clips[:1, IS_FRAME[0]], settings=settings)[0]
    assert answers[1] == captioner.answer(clips[1:], settings=settings)[0]


@pytest.mark.parametrize("temporal", WAYS)
def test_a_retriever_sees_the_real_frames(temporal, tmp_path):
    retriever = load_retriever(write_stage1(tmp_path / "one", bridge=bridge(temporal)))
    clips, other = pixels(retriever)
    texts = ["a small red circle", "a large blue triangle"]
    embeds, tokens = retriever.embed_image(clips, IS_FRAME)
    again, other_tokens = retriever.embed_image(other, IS_FRAME)
    assert embeds.equal(again)
    matches = retriever.match(tokens, texts, IS_FRAME)
    assert matches.equal(retriever.match(other_tokens, texts, IS_FRAME))
    alone, real_tokens = retriever.embed_image(clips[:1, IS_FRAME[0]])
    torch.testing.assert_close(matches[:1], retriever.match(real_tokens, texts[:1]), **CLOSE)
    best, best_alone = (found.amax(dim=1) for found in (embeds[:1], alone))  # padding repeats, and is no new maximum
    torch.testing.assert_close(best, best_alone, **CLOSE)
