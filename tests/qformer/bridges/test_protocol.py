"""What the seam promises every bridge: streams, masks of dropped queries, names of weights, attention maps."""

import dataclasses

import pytest
import torch
from torch import nn

from qformer.bridges.concatenate import ConcatenateConfig
from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.frames import without_unread
from qformer.bridges.protocol import BridgeInput, StreamingBridge
from qformer.bridges.reading import PassBlock, Passes, Reading
from qformer.bridges.stage_model import StageModel
from qformer.bridges.table import build_bridge
from tests.qformer.bridges.clips import CONFIG, WAYS, frames, stage1, stage2

IS_FRAME = torch.tensor([[True, False, True, True], [True, True, False, False], [True, True, True, True]])


class RunningMean(StreamingBridge):
    """Mean token of the frames so far, as one query output."""

    def begin(self, clips, given):
        return torch.zeros(clips, CONFIG.encoder_width), torch.zeros(clips, 1)

    def step(self, frame_BPV, is_frame_B, state, given):
        total, count = state
        is_frame_B1 = torch.ones_like(count) if is_frame_B is None else is_frame_B[:, None].float()
        state = total + frame_BPV.mean(dim=1) * is_frame_B1, count + is_frame_B1
        hidden = (state[0] / state[1].clamp(min=1))[:, None]
        return Reading(hidden[:, None], None, Passes(hidden, (PassBlock(len(hidden), 1),))), state


@torch.no_grad()
def test_a_stream_is_read_frame_by_frame_and_its_state_is_a_value():
    bridge, tokens = RunningMean(ConcatenateConfig(), CONFIG), frames()
    given = BridgeInput(tokens, IS_FRAME)
    whole = bridge.read(bridge.perceive(given), given).hidden_BSQD
    normed = bridge.vision_norm(tokens)
    expected = torch.stack([clip[mask].mean(dim=(0, 1)) for clip, mask in zip(normed, IS_FRAME, strict=True)])
    torch.testing.assert_close(whole[:, 0, 0], expected)
    # Two streams in turns give what each gives alone.
    states = [bridge.begin(1, given) for _ in range(2)]
    for frame in range(4):
        for clip in (0, 2):
            now = normed[clip : clip + 1, frame]
            reading, states[clip // 2] = bridge.step(now, IS_FRAME[clip : clip + 1, frame], states[clip // 2], given)
            if frame == 3:
                torch.testing.assert_close(reading.hidden_BSQD, whole[clip : clip + 1])


def test_dropped_queries_count_in_no_mean_and_no_maximum():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    is_query = torch.tensor([[True, True, False], [False, True, True]])
    passes = Passes(hidden, (PassBlock(2, 1),), is_query)
    expected = torch.stack([own[mask].mean(dim=0) for own, mask in zip(hidden, is_query, strict=True)])
    torch.testing.assert_close(passes.mean(hidden), expected)
    filled = without_unread(hidden[:, None], is_query[:, None])[:, 0]
    for own, mask, replaced in zip(hidden, is_query, filled, strict=True):
        assert replaced.amax(dim=0).equal(own[mask].amax(dim=0))


@pytest.mark.parametrize("kind", WAYS)
def test_weights_are_named_alike_in_both_stages_and_without_a_prefix(kind):
    names = [{name.split(".")[0] for name in model.state_dict()} for model in (stage1(kind), stage2(kind))]
    own = {"vision_norm", "qformer"} | ({"frames"} if kind in ("cascaded", "spatio_temporal") else set())
    assert names[0] - own == {"vision_projection", "text_projection", "itm_head", "temperature"}
    assert names[1] - own == {"language_projection"}


def test_a_stage_refuses_what_it_cannot_train_and_what_its_checkpoints_cannot_name():
    bridge = build_bridge(ConcatenateConfig(), CONFIG)
    with pytest.raises(ValueError, match="kind=concatenate: stage 3 cannot train it, stage 1 and 2 can"):
        StageModel(bridge, stage=3)
    bridge.gate = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"Concatenate\.gate lies on the bridge itself; put it into a submodule"):
        StageModel(bridge, stage=1)
    model = StageModel(build_bridge(ConcatenateConfig(), CONFIG), stage=1)
    with pytest.raises(ValueError, match=r"Concatenate\.qformer has the name of a stage's head; rename it"):
        model.add_head("qformer", nn.Linear(1, 1))


def test_a_bridge_switches_between_training_and_evaluation_with_its_stage():
    model = stage2("cascaded", freeze_frames=True)
    for mode in (True, False):
        assert model.train(mode).bridge.training == mode and model.qformer.training == mode
        assert not model.frames.qformer.training


@torch.no_grad()
def test_attention_maps_leave_masked_tokens_out():
    model, given = stage1("spatio_temporal").eval(), BridgeInput(frames(), IS_FRAME)
    percept = model.bridge.perceive(given)
    keys = model.bridge.keys(percept)
    maps = model.qformer.cross_attention_maps(keys.layers, keys.is_token)
    every = [map_BHQP.sum(dim=-1) for map_BHQP in maps]
    assert maps and all(torch.allclose(total, torch.ones_like(total)) for total in every)
    hidden = ~percept.is_token[:, None].expand_as(maps[0])
    assert hidden.any() and all((map_BHQP[hidden] == 0).all() for map_BHQP in maps)
    # They are the attention that the pass itself has: those of a clip without its padding.
    alone = BridgeInput(given.tokens_BFPV[1:2, :2])
    own = model.bridge.keys(model.bridge.perceive(alone))
    short = model.qformer.cross_attention_maps(own.layers, own.is_token)
    places = torch.tensor([*range(9)])
    for map_BHQP, expected in zip(maps, short, strict=True):
        torch.testing.assert_close(map_BHQP[1:2, ..., places], expected, atol=1e-5, rtol=1e-4)


def test_a_config_outside_the_table_becomes_no_other_bridge():
    with pytest.raises(AssertionError, match="unreachable"):
        build_bridge(BaseBridgeConfig(kind="concatenate"), CONFIG)


def test_a_config_is_frozen_and_says_its_kind():
    for kind in WAYS:
        config = stage2(kind).bridge.config
        assert config.kind == kind and config.stages == {1, 2} and config.term_names == ()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.kind = "mean"
