"""The spatio-temporal Q-Former against its plain twin, and what each kind of queries attends to."""

import pytest
import torch

from qformer.bridges.protocol import BridgeInput
from qformer.objectives.stage1 import Stage1
from tests.qformer.bridges.clips import BRIDGES, CLOSE, CONFIG, bridge, frames, prompts, stage2
from tests.qformer.bridges.plain_spatio_temporal import plain_prompts

IS_FRAME = torch.tensor([[True, False, True, True], [True, True, False, False], [True, True, True, True]])
NUM_TOKENS = 7


@pytest.mark.parametrize("number", [1, 4, 9])
def test_fast_equals_plain(number):
    """Also of clips longer than the trained positions."""
    is_frame = IS_FRAME if number == 4 else torch.ones(3, number, dtype=torch.bool)
    fast, slow, image = stage2("spatio_temporal"), stage2("spatio_temporal"), frames(number=number)
    found, expected = prompts(fast, image, is_frame), plain_prompts(slow, image, is_frame)
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, one), two in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: name + text)


@torch.no_grad()
def test_each_kind_of_queries_attends_to_its_own_tokens():
    model = stage2("spatio_temporal")
    percept = model.bridge.perceive(BridgeInput(frames(), IS_FRAME))
    spatial, temporal, summary = percept.is_token.split(BRIDGES["spatio_temporal"].group_sizes, dim=1)
    every = torch.ones(3, 1, NUM_TOKENS, dtype=torch.bool)
    assert spatial.equal(torch.cat([every, torch.zeros(3, 1, 4, dtype=torch.bool)], dim=-1).expand_as(spatial))
    assert temporal.equal(torch.cat([~every, IS_FRAME[:, None]], dim=-1).expand_as(temporal))
    assert summary.equal(torch.cat([every, IS_FRAME[:, None]], dim=-1).expand_as(summary))


@torch.no_grad()
def test_of_one_frame_without_positions_the_map_is_the_image():
    model, image = stage2("spatio_temporal"), frames(number=1)
    model.frames.positions.table_MD.zero_()
    tokens = model.bridge.perceive(BridgeInput(image)).tokens_BFPV[:, 0]
    assert tokens[:, :NUM_TOKENS].equal(model.vision_norm(image)[:, 0])


def test_every_kind_begins_with_the_same_feed_forward():
    model = Stage1(CONFIG, bridge=bridge("spatio_temporal"))
    for layer in model.qformer.layers:
        first, *others = (expert.state_dict() for expert in layer.query_ffn.experts)
        assert all(one[name].equal(first[name]) for one in others for name in first)
        assert all(first[name].equal(tensor) for name, tensor in layer.text_ffn.state_dict().items())


def test_frozen_attention_is_left_alone_and_the_rest_learns():
    model = stage2("spatio_temporal", freeze_attention=True).train()
    prompts(model, frames()).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name in dict(model.named_parameters()) if "attention." in name}
