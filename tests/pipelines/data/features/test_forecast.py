"""The forecast of a feature cache: its size by formula, its time by measured rows."""

import dataclasses

import numpy as np
import pytest

from pipelines.data import schema
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.batches.stage_report import format_bytes
from pipelines.data.features.forecast import forecast, measured_blocks
from pipelines.data.features.shard_encoder import EncoderChoice, measure_rows
from pipelines.data.features.shards import shard_blocks, write_shard
from pipelines.data.features.spec import FeatureSpec
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.media.stage_costs import StageCosts
from qformer.config import VisionSpec
from tests.pipelines.data.builders import DECODE, PREPROCESSING, image_manifest, manifest

VIT_G = FeatureSpec(
    vision="eva_giant_patch14_clip_224",
    weights="0" * 64,
    layer=-2,
    precision="fp32",
    preprocessing=PREPROCESSING,
    num_frames=8,
    sampling=Sampling(),
    num_tokens=257,
    width=1408,
    dtype="fp16",
)


def _shards(num_images, num_clips):
    rows = [{"sample_id": f"i{n}", "media": f"/i{n}.jpg"} for n in range(num_images)]
    rows += [{"sample_id": f"c{n}", "media": f"/c{n}.mp4", "kind": "video"} for n in range(num_clips)]
    return shard_blocks(manifest(rows), DECODE)


def test_an_image_of_vit_g_takes_707_kib():
    assert format_bytes(VIT_G.row_bytes("image")) == "707 KiB"
    assert VIT_G.row_bytes("video") == 8 * 723_712
    assert format_bytes(dataclasses.replace(VIT_G, dtype="int8").row_bytes("image")) == "354 KiB"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_files_are_as_large_as_forecast(tmp_path, dtype):
    names = [f"s{n}" for n in range(3)]
    batch = SampleBatch(
        0, 0, names, [""] * 3, np.arange(3), np.ones(3, bool), np.zeros((3, 1)), [], np.ones((3, 1), bool)
    )
    tokens = [np.random.default_rng(n).standard_normal((1, 257, 1408)).astype(np.float32) for n in range(3)]
    write_shard(str(tmp_path), batch, tokens, dtype, [None] * 3)
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    expected = forecast(_shards(3, 0), dataclasses.replace(VIT_G, dtype=dtype), [], decode_workers=1, workers=1)
    assert expected.size_bytes == pytest.approx(found, rel=0.01)
    assert "too few rows" in str(expected)


def test_measured_rows_scale_to_all():
    shards = _shards(1600, 400)
    images, clips = measured_blocks(shards)
    assert len(images) == len(clips) == 16
    # Spread evenly: the first and the last row of the kind are among them.
    assert images[schema.SAMPLE_ID].to_pylist()[::15] == ["i0", "i1599"]
    costs = [StageCosts(decode_s=0.16, encode_s=0.8), StageCosts(fetch_s=0.1, decode_s=1.5, encode_s=1.6)]
    expected = forecast(shards, VIT_G, list(zip((images, clips), costs, strict=True)), decode_workers=2, workers=1)
    assert expected.decode_s == pytest.approx((100 * 0.16 + 25 * 1.6) / 2)
    assert expected.encode_s == expected.total_s == pytest.approx(100 * 0.8 + 25 * 1.6)
    assert str(expected) == "forecast: 2000 rows, 3 GiB, 2 min at 16.7 rows/s, limited by encoding"


def test_short_jobs_are_not_measured():
    assert measured_blocks(_shards(100, 0)) == []


def test_rows_are_measured_by_decoding_and_encoding_them(tmp_path):
    choice = EncoderChoice(
        vision=VisionSpec("test_vit", pretrained=False), precision="fp32", num_frames=4, dtype="fp16"
    )
    spec = choice.load()[1]
    decode = DecodeSettings(preprocessing=spec.preprocessing, num_frames=4)
    (block,) = shard_blocks(image_manifest(tmp_path, 4), decode)
    (costs,) = measure_rows(choice, decode, 2, "cpu", [block])
    assert min(costs.fetch_s, costs.decode_s, costs.transform_s, costs.encode_s, costs.write_s) > 0
