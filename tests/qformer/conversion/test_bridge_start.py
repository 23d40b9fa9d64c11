"""Checkpoints of bridges that join frames: written, read, started from an image's, and refused without a place."""

import dataclasses
import json

import pytest

from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.config import AudioConfig
from qformer.bridges.mean import MeanConfig
from qformer.bridges.spatio_temporal import SpatioTemporalConfig
from qformer.bridges.table import IMAGE_BRIDGE, bridge_config, build_bridge
from qformer.config import AudioSpec, LanguageSpec, QFormerConfig
from qformer.conversion.checkpoint import BridgeInfo, load_weights, save_bridge
from qformer.conversion.huggingface import export_huggingface
from qformer.conversion.initialisation import start_stage1, start_stage2
from qformer.errors import UserError
from tests.qformer.bridges.clips import BRIDGES, CONFIG, JOINED, WAYS, bridge, stage1, stage2
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


@pytest.mark.parametrize("kind", JOINED)
def test_a_description_survives_its_file(kind):
    info = dataclasses.replace(
        info_of(2, READS_NOTHING, "a"),
        bridge=bridge(kind),
        audio=AudioSpec("b", pretrained=False),
        audio_branch=AUDIO,
    )
    assert BridgeInfo.from_json(info.to_json()) == info
    for damaged in (('"bridge"', '"unknown"'), (f'"{kind}"', '"median"'), ('"max_frames"', '"max_clips"')):
        with pytest.raises(UserError, match="damaged"):
            BridgeInfo.from_json(info.to_json().replace(*damaged))


def of_version_1(**more):
    """A description as version 1 wrote it."""
    values = json.loads(info_of(2, READS_NOTHING, "a").to_json())
    for name in ("bridge", "audio", "audio_branch"):
        del values[name]
    former = {"vision": "v", "vision_pretrained": True, "vision_layer": -1, "language": "a", "format_version": 1}
    return json.dumps({**values, **former, **more})


def test_the_earliest_description_keeps_frames_apart():
    info = BridgeInfo.from_json(of_version_1())
    assert info.bridge == IMAGE_BRIDGE and info.audio_branch is None


@pytest.mark.parametrize("kind", JOINED)
def test_an_image_bridge_starts_both_stages(tmp_path, kind):
    image = stage1("concatenate")
    folder = save(tmp_path / "image", image)
    theirs = image.state_dict()
    for model, start in ((stage1(kind), start_stage1), (stage2(kind), start_stage2)):
        report = start(model, folder, **({"language": "a"} if start is start_stage2 else {}))
        own = model.state_dict()
        place = "frames.qformer" if kind == "cascaded" else "qformer"
        assert own[f"{place}.layers.0.attention.query.weight"].equal(theirs["qformer.layers.0.attention.query.weight"])
        assert own["vision_norm.weight"].equal(theirs["vision_norm.weight"])
        assert not report.missing and not report.unexpected
        new = {name.rpartition(".")[0] for name in report.reinitialised}
        if kind == "cascaded":
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


@pytest.mark.parametrize("kind", JOINED)
def test_stage_2_goes_on_from_stage_1_of_the_same_way(tmp_path, kind):
    trained, model = stage1(kind, seed=3), stage2(kind)
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


@pytest.mark.parametrize("kind", JOINED)
def test_hugging_face_has_no_place_for_joined_frames(tmp_path, kind):
    folder = save(tmp_path / "two", stage2(kind))
    with pytest.raises(UserError, match=f"kind='{kind}'.*no place"):
        export_huggingface(folder, tmp_path / "out")


def test_hugging_face_has_no_place_for_sound(tmp_path):
    folder = save(tmp_path / "two", stage2("mean", audio=AUDIO), audio=AudioSpec("an-encoder"), audio_branch=AUDIO)
    with pytest.raises(UserError, match="a branch for sound.*an-encoder.*no place"):
        export_huggingface(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "cascaded", "num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"kind": "median"}, "kind='median' is none of concatenate, mean, cascaded, spatio_temporal"),
        ({"num_layers": 1}, "kind=None is none of"),
    ],
)
def test_what_describes_no_bridge_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        bridge_config(values)


def test_a_size_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="num_layers"):
        bridge_config({"kind": "mean", "num_layers": 1})


@pytest.mark.parametrize("kind", WAYS)
def test_a_file_of_version_1_describes_the_same_bridge(kind):
    """It named every size, also those of other kinds, which had no effect."""
    sizes = {
        **{"max_frames": 6, "num_queries": 4, "num_layers": 2, "freeze_frames": False, "freeze_attention": False},
        **{"num_spatial_queries": 3, "num_temporal_queries": 4, "num_summary_queries": 2},
    }
    assert BridgeInfo.from_json(of_version_1(video={"temporal": kind, **sizes})).bridge == BRIDGES[kind]
    with pytest.raises(UserError, match="damaged.*median"):
        BridgeInfo.from_json(of_version_1(video={"temporal": "median", **sizes}))


def test_the_shapes_of_the_q_former_that_is_read():
    config = QFormerConfig(encoder_width=20, hidden_size=8, num_heads=2, num_queries=3, vocab_size=9)
    cascade = build_bridge(CascadedConfig(num_queries=4, num_layers=1), config).qformer.config
    assert (cascade.encoder_width, cascade.num_queries, cascade.num_layers, cascade.vocab_size) == (8, 4, 1, 9)
    assert build_bridge(SpatioTemporalConfig(), config).qformer.config.num_queries == 65
    assert build_bridge(MeanConfig(), config).qformer.config is config
