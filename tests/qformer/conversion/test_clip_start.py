"""Checkpoints of bridges that join frames: written, read, started from an image's, and refused without a place."""

import dataclasses

import pytest

from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.config import AudioConfig
from qformer.bridges.spatio_temporal import SpatioTemporalConfig
from qformer.bridges.table import IMAGE_BRIDGE, bridge_config
from qformer.config import AudioSpec, LanguageSpec, QFormerConfig
from qformer.conversion.checkpoint import BridgeInfo, load_weights, save_bridge
from qformer.conversion.huggingface import export_huggingface
from qformer.conversion.initialisation import start_stage1, start_stage2
from qformer.errors import UserError
from tests.qformer.bridges.clips import CONFIG, JOINED, bridge, stage1, stage2
from tests.tiny_checkpoints import info_of

AUDIO = AudioConfig(encoder_width=10, num_queries=3, num_layers=1)
READS_NOTHING = dataclasses.replace(CONFIG, vocab_size=0)


def save(folder, model, **more):
    folder.mkdir()
    stage = 1 if hasattr(model, "itm_head") else 2
    config = CONFIG if stage == 1 else READS_NOTHING
    info = dataclasses.replace(info_of(stage, config, "a" if stage == 2 else None), bridge=model.bridge.config, **more)
    save_bridge(folder, info, model.state_dict(), None)
    return folder


@pytest.mark.parametrize("temporal", JOINED)
def test_a_description_survives_its_file(temporal):
    info = dataclasses.replace(
        info_of(2, READS_NOTHING, "a"),
        bridge=bridge(temporal),
        audio=AudioSpec("b", pretrained=False),
        audio_branch=AUDIO,
    )
    assert BridgeInfo.from_json(info.to_json()) == info
    older = info.to_json().replace('"bridge"', '"unknown"')
    with pytest.raises(UserError, match="damaged"):
        BridgeInfo.from_json(older)


def test_an_older_description_keeps_frames_apart():
    import json

    values = json.loads(info_of(2, READS_NOTHING, "a").to_json())
    for name in ("bridge", "audio", "audio_branch"):
        del values[name]
    info = BridgeInfo.from_json(json.dumps(values))
    assert info.bridge == IMAGE_BRIDGE and info.audio_branch is None


@pytest.mark.parametrize("temporal", JOINED)
def test_an_image_bridge_starts_both_stages(tmp_path, temporal):
    image = stage1("concatenate")
    folder = save(tmp_path / "image", image)
    theirs = image.state_dict()
    for model, start in ((stage1(temporal), start_stage1), (stage2(temporal), start_stage2)):
        report = start(model, folder, **({"language": "a"} if start is start_stage2 else {}))
        own = model.state_dict()
        place = "frames.qformer" if temporal == "cascaded" else "qformer"
        assert own[f"{place}.layers.0.attention.query.weight"].equal(theirs["qformer.layers.0.attention.query.weight"])
        assert own["vision_norm.weight"].equal(theirs["vision_norm.weight"])
        assert not report.missing and not report.unexpected
        new = {name.rpartition(".")[0] for name in report.reinitialised}
        if temporal == "cascaded":
            assert own[f"{place}.query_tokens"].equal(theirs["qformer.query_tokens"])
            assert {"frames.positions", "qformer.layers.1.cross_attention.query"} <= new
        else:
            for layer in range(2):
                ffn = theirs[f"qformer.layers.{layer}.query_ffn.up.weight"]
                assert all(own[f"qformer.layers.{layer}.query_ffn.experts.{i}.up.weight"].equal(ffn) for i in range(3))
            assert new - {"language_projection"} == {"frames.positions", "frames.over_frames", "frames.over_space"}


def test_queries_of_every_kind_as_large_begin_as_the_image_s(tmp_path):
    image = stage1("concatenate")
    folder = save(tmp_path / "image", image)
    model = stage1("spatio_temporal", num_spatial_queries=5, num_temporal_queries=5)
    summary = model.qformer.query_tokens[:, 10:].clone()
    start_stage1(model, folder)
    spatial, temporal, rest = model.qformer.query_tokens.split([5, 5, 2], dim=1)
    assert spatial.equal(image.qformer.query_tokens) and temporal.equal(spatial) and rest.equal(summary)


@pytest.mark.parametrize("temporal", JOINED)
def test_stage_2_goes_on_from_stage_1_of_the_same_way(tmp_path, temporal):
    trained, model = stage1(temporal, seed=3), stage2(temporal)
    report = start_stage2(model, save(tmp_path / "one", trained), language=LanguageSpec("a"))
    theirs, own = trained.state_dict(), model.state_dict()
    assert {name.split(".")[0] for name in report.reinitialised} == {"language_projection"}
    assert all(own[name].equal(theirs[name]) for name in own if not name.startswith("language_projection."))


def test_a_branch_for_sound_begins_anew_beside_a_trained_bridge(tmp_path):
    folder = save(tmp_path / "two", stage2("cascaded", seed=3))
    model = stage2("cascaded", audio=AUDIO)
    report = start_stage2(model, folder, language=LanguageSpec("a"))
    assert {name.split(".")[0] for name in report.reinitialised} == {"audio"}
    heard = save(tmp_path / "heard", model, audio=AudioSpec("b"), audio_branch=AUDIO)
    again = stage2("cascaded", audio=AUDIO, seed=9)
    assert not start_stage2(again, heard, language=LanguageSpec("a")).reinitialised
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in again.state_dict().items())
    silent = stage2("cascaded", audio=AUDIO, seed=8)
    load_weights(silent, heard)


@pytest.mark.parametrize(("theirs", "ours"), [("cascaded", "spatio_temporal"), ("cascaded", "mean"), (*JOINED[::-1],)])
def test_another_way_to_join_frames_is_no_beginning(tmp_path, theirs, ours):
    folder = save(tmp_path / "one", stage1(theirs))
    with pytest.raises(UserError, match=f"kind='{theirs}', which does not start kind='{ours}'"):
        start_stage1(stage1(ours), folder)


@pytest.mark.parametrize("temporal", JOINED)
def test_hugging_face_has_no_place_for_joined_frames(tmp_path, temporal):
    folder = save(tmp_path / "two", stage2(temporal))
    with pytest.raises(UserError, match=f"kind='{temporal}'.*no place"):
        export_huggingface(folder, tmp_path / "out")


def test_hugging_face_has_no_place_for_sound(tmp_path):
    folder = save(tmp_path / "two", stage2("mean", audio=AUDIO), audio=AudioSpec("an-encoder"), audio_branch=AUDIO)
    with pytest.raises(UserError, match="a branch for sound.*an-encoder.*no place"):
        export_huggingface(folder, tmp_path / "out")


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        dataclasses.replace(bridge("cascaded"), num_layers=0)
    with pytest.raises(ValueError, match="bridge kind='median' is none of concatenate, mean,"):
        bridge_config({"kind": "median"})


def test_the_shapes_of_the_q_former_that_is_read():
    config = QFormerConfig(encoder_width=20, hidden_size=8, num_heads=2, num_queries=3, vocab_size=9)
    cascade = CascadedConfig(num_queries=4, num_layers=1).reader(config)
    assert (cascade.encoder_width, cascade.num_queries, cascade.num_layers, cascade.vocab_size) == (8, 4, 1, 9)
    assert SpatioTemporalConfig().reader(config).num_queries == 65
