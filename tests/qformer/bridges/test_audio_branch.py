"""Sound beside the frames: read where there is some, left out where there is none."""

import dataclasses

import pytest
import torch

from qformer.bridges.audio_branch import Sound
from qformer.bridges.config import AudioConfig
from qformer.language import LanguageBatch
from qformer.objectives.stage2 import Stage2
from tests.qformer.bridges.clips import CLOSE, CONFIG, VIDEO, frames, stage2, video
from tests.qformer.test_language import tiny_language

AUDIO = AudioConfig(encoder_width=10, max_segments=4, num_queries=3, num_layers=1)
JOINT = AudioConfig(encoder_width=CONFIG.hidden_size, is_joint=True)


def sound(clips=3, segments=4, width=10, is_segment=None):
    audio = torch.randn(clips, segments, width, generator=torch.Generator().manual_seed(5))
    return Sound(audio, torch.ones(clips, segments, dtype=torch.bool) if is_segment is None else is_segment)


def read(model, image, heard):
    prompts = model(image, sound=heard)
    is_prompt = model.is_prompt(None, heard, prompts)
    return [rows if is_prompt is None else rows[is_prompt[i]] for i, rows in enumerate(prompts)]


@torch.no_grad()
def test_sound_follows_the_frames_and_is_left_out_where_there_is_none():
    model, image = stage2("cascaded", audio=AUDIO).eval(), frames()
    is_segment = torch.tensor([[True, True, True, True], [False] * 4, [False, True, True, False]])
    heard = sound(is_segment=is_segment)
    rows = read(model, image, heard)
    assert [len(one) for one in rows] == [VIDEO.num_queries + 3, VIDEO.num_queries, VIDEO.num_queries + 3]
    without = read(model, image, None)
    assert [len(one) for one in without] == [VIDEO.num_queries] * 3
    for one, other in zip(rows, without, strict=True):
        assert one[: VIDEO.num_queries].equal(other)  # the frames are read the same with sound and without
    # What is marked as no sound changes nothing; what is marked as sound does.
    silent = Sound(heard.audio_BAV.masked_fill(~is_segment[..., None], float("nan")), is_segment)
    assert all(one.equal(other) for one, other in zip(rows, read(model, image, silent), strict=True))
    louder = Sound(heard.audio_BAV + 1.0, is_segment)
    assert [one.equal(other) for one, other in zip(rows, read(model, image, louder), strict=True)] == [
        False,
        True,
        False,
    ]


@torch.no_grad()
def test_a_segment_keeps_its_place_in_time():
    """Sound that begins late is not sound that begins at once."""
    model, image = stage2("mean", audio=AUDIO).eval(), frames(1)
    audio = sound(1).audio_BAV
    late = Sound(audio, torch.tensor([[False, False, True, True]]))
    early = Sound(audio.roll(2, dims=1), torch.tensor([[True, True, False, False]]))
    assert (read(model, image, late)[0] - read(model, image, early)[0])[-3:].abs().max() > 0.01


@torch.no_grad()
def test_a_batch_with_and_without_sound_equals_its_clips():
    model, image = stage2("spatio_temporal", audio=AUDIO).eval(), frames()
    is_segment = torch.tensor([[True] * 4, [False] * 4, [True, False, False, False]])
    heard = sound(is_segment=is_segment)
    for clip, rows in enumerate(read(model, image, heard)):
        own = Sound(*(tensor[clip : clip + 1] for tensor in heard)) if is_segment[clip].any() else None
        torch.testing.assert_close(rows, read(model, image[clip : clip + 1], own)[0], **CLOSE)


@pytest.mark.parametrize("heard", [None, sound(), sound(is_segment=torch.zeros(3, 4, dtype=torch.bool))])
def test_every_weight_has_a_gradient_with_sound_and_without(heard):
    model = stage2("concatenate", audio=AUDIO).train()
    model(frames(), sound=heard).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("temporal", ["concatenate", "cascaded"])
def test_the_branch_alone_is_trained_and_read(temporal):
    config = dataclasses.replace(CONFIG, vocab_size=0)
    model = Stage2(config, language_width=16, video=video(temporal), audio=AUDIO, trains_audio_alone=True).train()
    is_frame = torch.tensor([[True, False, True, False]] * 3)
    prompts = model(frames(), is_frame_BF=is_frame, sound=sound())
    assert prompts.shape == (3, 3, 16)
    assert model.is_prompt(is_frame, sound(), prompts) is None
    assert model.query_outputs(prompts).shape == (3, 3, 16)
    prompts.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in dict(model.named_parameters()) if name.startswith("audio.")}


@torch.no_grad()
def test_joint_sound_is_read_with_the_frames():
    model, image = stage2("cascaded", audio=JOINT).eval(), frames()
    heard = sound(width=CONFIG.hidden_size)
    assert model.audio is None and len(read(model, image, heard)[0]) == VIDEO.num_queries
    assert (model(image, sound=heard) - model(image)).abs().max() > 0.01
    nothing = heard._replace(is_segment_BA=torch.zeros(3, 4, dtype=torch.bool))
    assert model(image, sound=nothing).equal(model(image))
    # As many segments as a clip has frames, none of which an image has.
    assert model(image[:, :1], sound=nothing).equal(model(image[:, :1]))


@torch.no_grad()
def test_joint_sound_beside_a_repeated_frame_is_read():
    model, image = stage2("cascaded", audio=JOINT).eval(), frames()
    is_frame = torch.tensor([[True, False, True, False]] * 3)
    heard = sound(width=CONFIG.hidden_size)
    other = heard._replace(audio_BAV=heard.audio_BAV.index_fill(1, torch.tensor([1]), 3.0))
    one, two = (model(image, is_frame_BF=is_frame, sound=given) for given in (heard, other))
    assert (one - two).abs().max() > 0.01
    # Where there is no sound beside it, nothing of it is.
    is_segment = torch.tensor([[True, False, True, True]] * 3)
    one, two = (
        model(image, is_frame_BF=is_frame, sound=given._replace(is_segment_BA=is_segment)) for given in (heard, other)
    )
    assert one.equal(two)


@pytest.mark.parametrize(
    ("audio", "heard", "message"),
    [
        (AUDIO, sound(width=9), r"sound is \(3, 4, 9\).*\[3, segments, 10\]"),
        (AUDIO, sound(clips=2), r"sound is \(2, 4, 10\).*these 3 clips"),
        (AUDIO, sound(is_segment=torch.ones(3, 5, dtype=torch.bool)), r"with a mask \(3, 5\)"),
        (JOINT, sound(segments=5, width=32), r"\[3, 4, 32\].*one segment a frame"),
        (None, sound(), "without audio branch"),
    ],
)
def test_sound_that_does_not_fit_is_refused(audio, heard, message):
    with pytest.raises(ValueError, match=message):
        stage2("cascaded", audio=audio)(frames(), sound=heard)


@pytest.mark.parametrize(("temporal", "width"), [("mean", 32), ("cascaded", 10)])
def test_joint_sound_without_a_place_is_refused(temporal, width):
    with pytest.raises(ValueError, match=f"encoder_width={width} with temporal='{temporal}' and hidden_size=32"):
        stage2(temporal, audio=dataclasses.replace(JOINT, encoder_width=width))


@pytest.mark.parametrize("audio", [None, JOINT])
def test_no_branch_cannot_be_trained_alone(audio):
    config = dataclasses.replace(CONFIG, vocab_size=0)
    with pytest.raises(ValueError, match="trains_alone=true without a branch"):
        Stage2(config, language_width=16, video=video("cascaded"), audio=audio, trains_audio_alone=True)


def language_batch():
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    return LanguageBatch(ids, ids != 0, ids.masked_fill(ids == 0, -100))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@torch.no_grad()
def test_rows_left_out_are_as_if_they_were_not_there(family):
    """Also in between, where they would move the text's positions."""
    language = tiny_language(family)
    prompts = torch.randn(2, 5, language.width, generator=torch.Generator().manual_seed(2))
    is_prompt = torch.tensor([[True, False, True, False, True], [True, True, False, False, False]])
    batch = language_batch()
    together = language.logits(prompts, batch, is_prompt)
    other = prompts.masked_fill(~is_prompt[..., None], 3.0)
    assert together.equal(language.logits(other, batch, is_prompt))
    for row in range(2):
        alone = language.logits(prompts[row : row + 1, is_prompt[row]], batch.rows(slice(row, row + 1)))
        kept = batch.is_input_BS[row]
        torch.testing.assert_close(together[row, kept], alone[0, kept], **CLOSE)
    total, count = language.loss(prompts, batch, is_prompt)
    assert total.isfinite() and count == 7
    own = [rows[mask] for rows, mask in zip(prompts, is_prompt, strict=True)]
    texts = language.generate(own, ["", ""])
    assert texts == [language.generate([rows], [""])[0] for rows in own]
