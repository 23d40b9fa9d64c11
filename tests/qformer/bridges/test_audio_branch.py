"""Sound beside the frames: read where there is some, left out where there is none."""

import dataclasses

import pytest
import torch

from qformer.bridges.audio_branch import Sound
from qformer.bridges.config import AudioConfig
from qformer.language import LanguageBatch
from qformer.objectives.stage2 import Stage2
from tests.qformer.bridges.clips import CLOSE, CONFIG, NUM_QUERIES, bridge, frames, prompts, read, stage2
from tests.qformer.test_language import tiny_language

AUDIO = AudioConfig(encoder_width=10, max_segments=4, num_queries=3, num_layers=1)
JOINT = AudioConfig(encoder_width=CONFIG.hidden_size, is_joint=True)


def sound(clips=3, segments=4, width=10, is_segment=None):
    audio = torch.randn(clips, segments, width, generator=torch.Generator().manual_seed(5))
    return Sound(audio, torch.ones(clips, segments, dtype=torch.bool) if is_segment is None else is_segment)


@torch.no_grad()
def test_sound_follows_the_frames_and_is_left_out_where_there_is_none():
    model, image = stage2("cascaded", audio=AUDIO).eval(), frames()
    is_segment = torch.tensor([[True, True, True, True], [False] * 4, [False, True, True, False]])
    given_sound = sound(is_segment=is_segment)
    rows = read(model, image, sound=given_sound)
    assert [len(one) for one in rows] == [NUM_QUERIES + 3, NUM_QUERIES, NUM_QUERIES + 3]
    without = read(model, image, sound=None)
    assert [len(one) for one in without] == [NUM_QUERIES] * 3
    for one, other in zip(rows, without, strict=True):
        assert one[:NUM_QUERIES].equal(other)  # the frames are read the same with sound and without
    # What is marked as no sound changes nothing; what is marked as sound does.
    silent = Sound(given_sound.audio_BAV.masked_fill(~is_segment[..., None], float("nan")), is_segment)
    assert all(one.equal(other) for one, other in zip(rows, read(model, image, sound=silent), strict=True))
    louder = Sound(given_sound.audio_BAV + 1.0, is_segment)
    assert [one.equal(other) for one, other in zip(rows, read(model, image, sound=louder), strict=True)] == [
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
    assert (read(model, image, sound=late)[0] - read(model, image, sound=early)[0])[-3:].abs().max() > 0.01


@torch.no_grad()
def test_a_batch_with_and_without_sound_equals_its_clips():
    model, image = stage2("spatio_temporal", audio=AUDIO).eval(), frames()
    is_segment = torch.tensor([[True] * 4, [False] * 4, [True, False, False, False]])
    given_sound = sound(is_segment=is_segment)
    for clip, rows in enumerate(read(model, image, sound=given_sound)):
        own = Sound(*(tensor[clip : clip + 1] for tensor in given_sound)) if is_segment[clip].any() else None
        torch.testing.assert_close(rows, read(model, image[clip : clip + 1], sound=own)[0], **CLOSE)


@pytest.mark.parametrize("given_sound", [None, sound(), sound(is_segment=torch.zeros(3, 4, dtype=torch.bool))])
def test_every_weight_has_a_gradient_with_sound_and_without(given_sound):
    model = stage2("concatenate", audio=AUDIO).train()
    prompts(model, frames(), sound=given_sound).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["concatenate", "cascaded"])
def test_the_branch_alone_is_trained_and_read(kind):
    config = dataclasses.replace(CONFIG, vocab_size=0)
    model = Stage2(config, language_width=16, bridge=bridge(kind), audio=AUDIO, trains_audio_alone=True).train()
    is_frame = torch.tensor([[True, False, True, False]] * 3)
    found = model(frames(), is_frame_BF=is_frame, sound=sound())
    assert found.prompts_BNL.shape == (3, 3, 16)
    assert found.is_prompt_BN is None
    assert model.query_outputs(found).shape == (3, 3, 16)
    found.prompts_BNL.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in dict(model.named_parameters()) if name.startswith("audio.")}


@torch.no_grad()
def test_joint_sound_is_read_with_the_frames():
    model, image = stage2("cascaded", audio=JOINT).eval(), frames()
    given_sound = sound(width=CONFIG.hidden_size)
    assert model.audio is None and len(read(model, image, sound=given_sound)[0]) == NUM_QUERIES
    assert (prompts(model, image, sound=given_sound) - prompts(model, image)).abs().max() > 0.01
    nothing = given_sound._replace(is_segment_BA=torch.zeros(3, 4, dtype=torch.bool))
    assert prompts(model, image, sound=nothing).equal(prompts(model, image))
    # As many segments as a clip has frames, none of which an image has.
    assert prompts(model, image[:, :1], sound=nothing).equal(prompts(model, image[:, :1]))


@torch.no_grad()
def test_joint_sound_beside_a_repeated_frame_is_read():
    model, image = stage2("cascaded", audio=JOINT).eval(), frames()
    is_frame = torch.tensor([[True, False, True, False]] * 3)
    given_sound = sound(width=CONFIG.hidden_size)
    other = given_sound._replace(audio_BAV=given_sound.audio_BAV.index_fill(1, torch.tensor([1]), 3.0))
    one, two = (prompts(model, image, is_frame, given) for given in (given_sound, other))
    assert (one - two).abs().max() > 0.01
    # Where there is no sound beside it, nothing of it is.
    is_segment = torch.tensor([[True, False, True, True]] * 3)
    one, two = (
        prompts(model, image, is_frame, given._replace(is_segment_BA=is_segment)) for given in (given_sound, other)
    )
    assert one.equal(two)


@pytest.mark.parametrize(
    ("audio", "given_sound", "message"),
    [
        (AUDIO, sound(width=9), r"sound is \(3, 4, 9\).*\[3, segments, 10\]"),
        (AUDIO, sound(clips=2), r"sound is \(2, 4, 10\).*these 3 clips"),
        (AUDIO, sound(is_segment=torch.ones(3, 5, dtype=torch.bool)), r"with a mask \(3, 5\)"),
        (JOINT, sound(segments=5, width=32), r"\[3, 4, 32\].*one segment a frame"),
        (None, sound(), "without audio branch"),
    ],
)
def test_sound_that_does_not_fit_is_refused(audio, given_sound, message):
    with pytest.raises(ValueError, match=message):
        stage2("cascaded", audio=audio)(frames(), sound=given_sound)


@pytest.mark.parametrize(("kind", "width"), [("mean", 32), ("cascaded", 10)])
def test_joint_sound_without_a_place_is_refused(kind, width):
    with pytest.raises(ValueError, match=f"encoder_width={width} with kind='{kind}' and hidden_size=32"):
        stage2(kind, audio=dataclasses.replace(JOINT, encoder_width=width))


@pytest.mark.parametrize("audio", [None, JOINT])
def test_no_branch_cannot_be_trained_alone(audio):
    config = dataclasses.replace(CONFIG, vocab_size=0)
    with pytest.raises(ValueError, match="trains_alone=true without a branch"):
        Stage2(config, language_width=16, bridge=bridge("cascaded"), audio=audio, trains_audio_alone=True)


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
