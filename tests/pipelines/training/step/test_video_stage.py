"""A batch of clips to the losses of both stages: padded frames and clips without sound, as the data plane has them."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.data.batches.batch import SampleBatch
from pipelines.training.step.objective import Objective
from pipelines.training.step.precision import Precision
from pipelines.training.step.stages import GenerationStage, RepresentationStage
from qformer.bridges.audio_branch import Sound
from qformer.bridges.config import AudioConfig
from qformer.language import build_language_model
from qformer.objectives.stage2 import Stage2
from tests.qformer.bridges.clips import CLOSE, CONFIG, WAYS, bridge, frames, spread, stage1
from tests.qformer.test_language import tiny_language
from tests.tiny_checkpoints import text_tokenizer

CAPTIONS = ("a small red circle", "a large blue triangle moving right", "green")
IS_FRAME = np.array([[True, False, True, False], [True, True, False, False], [False, True, True, False]])
AUDIO = AudioConfig(encoder_width=10, num_queries=3, num_layers=1)


def sample_batch(rows=slice(None), is_frame=IS_FRAME, audio_valid=None):
    """Of encoder tokens and vectors of sound, as a feature cache gives them."""
    tokens = frames(3, 4).numpy()
    if is_frame is None:  # the real frames alone
        tokens = tokens[IS_FRAME].reshape(3, 2, *tokens.shape[2:])
        is_frame = np.ones((3, 2), np.bool_)
    audio = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(4)).numpy()
    return SampleBatch(
        step=0,
        rank=0,
        sample_ids=["a", "b", "c"][rows],
        captions=list(CAPTIONS[rows]),
        image_ids=np.arange(3)[rows],
        is_valid=np.ones(3, np.bool_)[rows],
        images=tokens[rows],
        frame_valid=is_frame[rows],
        failures=[],
        audio=None if audio_valid is None else audio[rows],
        audio_valid=None if audio_valid is None else audio_valid[rows],
    )


def see(batch):
    return torch.from_numpy(batch.images)


def encode_audio(batch):
    return None if batch.audio is None else Sound(torch.from_numpy(batch.audio), torch.from_numpy(batch.audio_valid))


def generation_stage(temporal, micro_batch=None, **arguments):
    language = tiny_language("llama")
    torch.manual_seed(2)
    config = dataclasses.replace(CONFIG, vocab_size=0)
    model = spread(Stage2(config, language_width=language.width, bridge=bridge(temporal), **arguments))
    language = build_language_model(language.model, language.tokenizer, 16)
    return GenerationStage(
        see, model, language, None, prompt="", max_tokens=16, micro_batch=micro_batch, encode_audio=encode_audio
    )


def losses(stage, batch):
    """Terms, the mean cosine of the queries, and gradients."""
    numbers = Precision("fp32", torch.device("cpu"))
    outcome = stage.backward(stage.trainables, batch, 7, Objective(stage.terms, {"diversity": 0.5}), numbers)
    gradients = {name: one.grad for name, one in stage.trainables.named_parameters() if one.grad is not None}
    return {**outcome.losses, "cosine": outcome.query_cosine}, gradients


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("temporal", WAYS)
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_stage_2_of_padded_clips_is_that_of_shorter_ones(temporal, micro_batch):
    padded = losses(generation_stage(temporal, micro_batch), sample_batch())
    assert_same(padded, losses(generation_stage(temporal), sample_batch(is_frame=None)))


@pytest.mark.parametrize("temporal", WAYS)
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_stage_1_of_padded_clips_is_that_of_shorter_ones(temporal, micro_batch):
    def stage(size=None):
        return RepresentationStage(see, stage1(temporal), text_tokenizer(), size)

    assert_same(losses(stage(micro_batch), sample_batch()), losses(stage(), sample_batch(is_frame=None)))


def test_a_clip_without_sound_is_as_if_the_bridge_read_none():
    valid = np.array([[True] * 4, [False] * 4, [True, True, False, False]])
    deaf = np.zeros_like(valid)
    mixed = losses(generation_stage("cascaded", audio=AUDIO), sample_batch(audio_valid=valid))[0]["lm"]
    first, third = (slice(row, row + 1) for row in (0, 2))
    alone = [
        losses(generation_stage("cascaded", audio=AUDIO), sample_batch(rows, audio_valid=mask))[0]["lm"]
        for rows, mask in ((first, valid), (slice(1, 2), deaf), (third, valid))
    ]
    counts = [len(tiny_language("llama").tokenizer.encode(text)) + 1 for text in CAPTIONS]
    weighted = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(mixed, weighted, atol=1e-4, rtol=1e-4)


def test_where_sound_alone_is_trained_clips_without_any_do_not_count():
    valid = np.array([[True] * 4, [False] * 4, [True, True, False, False]])
    arguments = {"audio": AUDIO, "trains_audio_alone": True}
    mixed = losses(generation_stage("cascaded", **arguments), sample_batch(audio_valid=valid))
    whole = sample_batch(audio_valid=valid)
    kept = dataclasses.replace(whole, is_valid=np.array([True, False, True]))
    assert_same(mixed, losses(generation_stage("cascaded", **arguments), kept))
    assert mixed[1].keys() == {name for name in mixed[1] if name.startswith("audio.")}
    nothing = losses(generation_stage("cascaded", **arguments), sample_batch(audio_valid=np.zeros_like(valid)))
    assert nothing[0]["lm"] == 0 and all(not gradient.any() for gradient in nothing[1].values())


@pytest.mark.parametrize("temporal", WAYS)
def test_images_and_clips_train_the_same_bridge(temporal):
    """One after the other, as one stream brings them; DDP wants a gradient of every weight from each."""
    clips = sample_batch()
    images = dataclasses.replace(clips, images=clips.images[:, :1], frame_valid=np.ones((3, 1), np.bool_))
    for stage in (
        RepresentationStage(see, stage1(temporal), text_tokenizer()),
        generation_stage(temporal, audio=AUDIO),
    ):
        for batch in (images, clips):
            terms, gradients = losses(stage, batch)
            trained = {name for name, one in stage.trainables.named_parameters() if one.requires_grad}
            assert gradients.keys() == trained and all(value.isfinite() for value in terms.values())
            stage.trainables.zero_grad(set_to_none=True)
