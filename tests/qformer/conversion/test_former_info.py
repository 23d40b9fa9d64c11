"""bridge.json of format version 1: recorded by the version that wrote it, read by this one."""

import json
from pathlib import Path

from qformer.bridges.config import AudioConfig
from qformer.config import AudioSpec, LanguageSpec, LoraConfig, QFormerConfig, VisionSpec
from qformer.conversion.checkpoint import FORMAT_VERSION, BridgeInfo

FORMER = (Path(__file__).parent / "former_bridge.json").read_text()


def test_every_value_of_version_1_is_read():
    info = BridgeInfo.from_json(FORMER)
    assert info.vision == VisionSpec("checkpoint:vision", pretrained=False, layer=-1, image_size=96)
    assert info.audio == AudioSpec("ast", pretrained=False) and info.language == LanguageSpec("opt")
    assert (info.stage, info.step, info.num_frames, info.max_text_tokens) == (2, 7, 4, 16)
    assert info.qformer == QFormerConfig(encoder_width=4, hidden_size=12) and info.lora == LoraConfig(rank=2)
    assert info.audio_branch == AudioConfig(encoder_width=6) and info.audio_sampling["num_segments"] == 3


def test_what_it_left_out_takes_its_default():
    values = json.loads(FORMER)
    optional = ("vision_image_size", "audio", "audio_pretrained", "audio_branch", "audio_sampling")
    older = {name: value for name, value in values.items() if name not in optional}
    info = BridgeInfo.from_json(json.dumps({**older, "language": None, "stage": 1}))
    assert info.vision.image_size is None and info.audio is None and info.language is None


def test_it_is_written_in_the_present_version():
    info = BridgeInfo.from_json(FORMER)
    assert json.loads(info.to_json())["format_version"] == FORMAT_VERSION == 2
    assert BridgeInfo.from_json(info.to_json()) == info
