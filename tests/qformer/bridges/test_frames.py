"""Frames of a clip: padding changes nothing, order does where it should, any length is read."""

import dataclasses

import pytest
import torch

from qformer import backbones
from qformer.bridges import cascaded
from qformer.bridges.positions import FramePositions
from qformer.config import VisionSpec
from qformer.layers import QFormerLayers
from qformer.objectives import Negatives
from tests.qformer.bridges.clips import CLOSE, CONFIG, JOINED, WAYS, batch, frames, prompts, read, stage1, stage2

IS_FRAME = torch.tensor([[True, False, True, True], [True, True, False, False], [True, True, True, True]])


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("filling", [5.0, float("nan")])
@torch.no_grad()
def test_what_padding_holds_changes_nothing_of_the_soft_prompts(kind, filling):
    model, image = stage2(kind).eval(), frames()
    other = image.masked_fill(~IS_FRAME[:, :, None, None], filling)
    for ours, theirs in zip(read(model, image, IS_FRAME), read(model, other, IS_FRAME), strict=True):
        assert ours.isfinite().all() and ours.equal(theirs)
    shown = [not ours.equal(theirs) for ours, theirs in zip(read(model, image), read(model, other), strict=True)]
    assert shown == [True, True, False]  # without the mask, what the same frames hold matters


@pytest.mark.parametrize("kind", WAYS)
def test_what_padding_holds_changes_nothing_of_losses_and_gradients(kind):
    others = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]), torch.ones(3, dtype=torch.bool))
    found = []
    for filling in (0.0, 7.0, float("nan")):
        model = stage1(kind)
        full = batch(3, 4, is_frame=IS_FRAME)
        full = dataclasses.replace(full, image_BFPV=full.image_BFPV.masked_fill(~IS_FRAME[:, :, None, None], filling))
        losses = model(full, negatives=others)
        losses.total.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        found.append((losses.terms, gradients))
    for losses, gradients in found[1:]:
        assert all(value.isfinite() and value.equal(found[0][0][name]) for name, value in losses.items())
        assert all(gradient.equal(found[0][1][name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("kind", WAYS)
@torch.no_grad()
def test_clips_of_several_lengths_are_read_as_each_alone(kind):
    model, image = stage2(kind).eval(), frames()
    together = read(model, image, IS_FRAME)
    for clip, rows in enumerate(together):
        (alone,) = read(model, image[clip : clip + 1, IS_FRAME[clip]])
        torch.testing.assert_close(rows, alone, **CLOSE)


@pytest.mark.parametrize("kind", WAYS)
def test_stage_1_of_padded_clips_is_that_of_shorter_ones(kind):
    """Two clips of two frames, padded to four."""
    is_frame = torch.tensor([[True, False, True, False], [True, True, False, False]])
    others = Negatives(torch.tensor([1, 0]), torch.tensor([1, 0]), torch.ones(2, dtype=torch.bool))
    padded = batch(2, 4, is_frame=is_frame)
    short = dataclasses.replace(padded, image_BFPV=padded.image_BFPV[is_frame].unflatten(0, (2, 2)), is_frame_BF=None)
    first, second = stage1(kind), stage1(kind)
    ours, theirs = first(padded, negatives=others), second(short, negatives=others)
    ours.total.backward()
    theirs.total.backward()
    for name in ("itc", "itm", "itg"):
        torch.testing.assert_close(ours.terms[name], theirs.terms[name], **CLOSE)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
@pytest.mark.parametrize("kind", WAYS)
@torch.no_grad()
def test_the_order_of_frames(kind, order):
    model, image = stage2(kind).eval(), frames(number=5)
    difference = (prompts(model, image) - prompts(model, image[:, order])).abs().max()
    if kind == "mean":
        assert difference < 1e-5
    else:
        assert difference > 0.01


@pytest.mark.parametrize("kind", WAYS)
@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame_and_long_clips_are_read(kind):
    model = stage2(kind).eval()
    num_queries = model.qformer.config.num_queries
    for number in (1, 40):
        found = prompts(model, frames(2, number))
        rows = num_queries * number if kind == "concatenate" else num_queries
        assert found.shape == (2, rows, 16) and found.isfinite().all()


def test_positions_stretch_over_longer_clips_alone():
    positions = FramePositions(4, 3)
    table = positions.table_MD.detach()
    real = torch.ones(1, 4, dtype=torch.bool)
    assert positions(real)[0].equal(table)
    assert positions(real[:, :2])[0].equal(table[:2])
    # Padding in between moves no frame: the third is the clip's second.
    assert positions(torch.tensor([[True, False, True]]))[0, 2].equal(table[1])
    seven = positions(torch.ones(1, 7, dtype=torch.bool))[0]
    assert seven[::2].equal(table)
    torch.testing.assert_close(seven[1::2], (table[:-1] + table[1:]) / 2)
    # Each clip of a batch by its own length.
    both = positions(torch.tensor([[True] * 7, [True] * 4 + [False] * 3]))
    assert both[0].equal(seven) and both[1, :4].equal(table)


@pytest.mark.parametrize("kind", JOINED)
def test_every_weight_learns_and_the_position_of_every_frame(kind):
    model = stage2(kind).train()
    prompts(model, frames(number=4)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters() if "key.bias" not in name)
    moved = model.frames.positions.table_MD.grad.abs().amax(dim=1) > 0
    assert moved.tolist() == [True] * 4 + [False] * 2


def test_a_frozen_frame_q_former_is_left_alone():
    model = stage2("cascaded", freeze_frames=True).train()
    assert not model.frames.qformer.training and model.qformer.training and model.frames.training
    prompts(model, frames()).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = {name for name in dict(model.named_parameters()) if name.startswith(("vision_norm.", "frames.qformer."))}
    assert without == frozen


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 3, dtype=torch.bool), r"mask of frames is torch.bool \(3, 3\).*tokens are \(3, 4, 7, 24\)"),
        (torch.ones(3, 4), r"mask of frames is torch.float32"),
        (torch.zeros(3, 4, dtype=torch.bool), r"no frame that is not padding"),
    ],
)
def test_a_mask_of_other_frames_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        stage2("mean")(frames(), is_frame_BF=mask)
    with pytest.raises(ValueError, match=message):
        stage1("cascaded")(batch(3, 4, is_frame=mask))


def test_tokens_of_another_encoder_are_refused_by_the_frame_q_former():
    with pytest.raises(ValueError, match=rf"encoder_width={CONFIG.encoder_width}"):
        stage2("cascaded")(torch.zeros(1, 2, 7, CONFIG.hidden_size))


def test_the_frozen_encoder_sees_so_many_frames_at_a_time(monkeypatch):
    encoder, seen = backbones.load_vision(VisionSpec("test_vit", pretrained=False)), []
    size = (2, 5, 3, encoder.preprocessing.height, encoder.preprocessing.width)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = encoder(pixels)
    monkeypatch.setattr(backbones, "FRAMES_PER_PASS", 4)
    encoder.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(encoder(pixels), whole, **CLOSE)
    assert seen == [4, 4, 2]


@torch.no_grad()
def test_a_frozen_frame_q_former_reads_so_many_frames_at_a_time(monkeypatch):
    model, image, read = stage2("cascaded", freeze_frames=True).eval(), frames(2, 5), []
    whole = prompts(model, image)
    monkeypatch.setattr(cascaded, "FRAMES_PER_PASS", 4)
    model.frames.qformer.layers.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    torch.testing.assert_close(prompts(model, image), whole, **CLOSE)
    assert read == [CONFIG.num_queries * number for number in (4, 4, 2)]


def test_gradients_through_several_passes_are_those_of_one(monkeypatch):
    # In fp64: in fp32 some processors' sums differ by more than the tolerance.
    model, image, read = stage2("cascaded").eval().double(), frames(2, 5).double(), []

    def outcome():
        model.zero_grad()
        found = prompts(model, image)
        found.square().sum().backward()
        return found.detach(), {name: one.grad.clone() for name, one in model.named_parameters()}

    whole, gradients = outcome()
    monkeypatch.setattr(cascaded, "FRAMES_PER_PASS", 4)
    model.frames.qformer.layers.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    parts, summed = outcome()
    assert read == [CONFIG.num_queries * number for number in (4, 4, 2)]
    torch.testing.assert_close(parts, whole, **CLOSE)
    assert any(name.startswith("frames.qformer") for name in gradients)
    for name, one in gradients.items():
        torch.testing.assert_close(summed[name], one, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", JOINED)
def test_compiled_layers_equal_eager_ones(kind):
    """As a run compiles them: all of a bridge's, without graph breaks."""
    torch._dynamo.reset()
    eager, compiled, image = stage2(kind), stage2(kind), frames()
    for module in compiled.modules():
        if isinstance(module, QFormerLayers):
            module.compile(backend="aot_eager", fullgraph=True)
    outputs = [prompts(model, image, IS_FRAME) for model in (eager, compiled)]
    torch.testing.assert_close(*outputs, **CLOSE)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), two in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: name + text)
