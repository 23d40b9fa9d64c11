"""Sound in batches and in the feature cache: valid segments arrive unchanged, and no others."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data import schema
from pipelines.data.batches.audio_rows import AUDIO_VALID, AudioRows
from pipelines.data.batches.batch import split_steps, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import RowLookup, evaluation_blocks, training_blocks
from pipelines.data.features.cache import ReadFeatures, locate, open_cache
from pipelines.data.features.files import SHARD_SCHEMA, open_shard
from pipelines.data.features.shard_encoder import DecodeShards, EncoderChoice, EncodeShards
from pipelines.data.features.shards import is_shard_finished, write_index
from pipelines.data.features.spec import FeatureSpec, read_spec, write_spec
from pipelines.data.media.audio_sampling import AudioSampling, AudioSegments
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.global_batches import PADDING, StepRows
from pipelines.data.order.row_index import TableRows
from qformer.audio import load_audio
from qformer.config import AudioSpec, VisionSpec
from qformer.errors import UserError
from tests.pipelines.data.builders import (
    DECODE,
    PREPROCESSING,
    image_manifest,
    manifest,
    stairs,
    write_clip,
    write_sounding_clip,
)
from tests.tiny_audio import write_encoder

SAMPLING = AudioSampling(sample_rate_hz=16_000, num_segments=3, segment_s=1.0)
ROWS_PER_SHARD = 3
BATCHES = [[2, 3, 4], [5, 2, PADDING], [0, 1, PADDING]]
"""Row numbers of `table`: clips, clips, images."""
OLD_FINGERPRINT = "7807e821b952cf352920930f790a76c0a925e6aeae45f19c9281166413cacecc"
"""Of a spec without sound, as versions that knew none wrote it: their caches stay good."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two images; clips of 9 s with sound, without, and of half a second; a clip that is missing."""
    folder = tmp_path_factory.mktemp("media")
    write_sounding_clip(folder / "long.mp4", stairs(9, 44_100), rate_hz=44_100)
    write_clip(folder / "mute.mp4", [100] * 30)
    write_sounding_clip(folder / "short.mp4", stairs(0.5, 44_100), rate_hz=44_100)
    clips = [
        {"sample_id": name, "media": str(folder / f"{name}.mp4"), "kind": "video"}
        for name in ("long", "mute", "short", "gone")
    ]
    return pa.concat_tables([image_manifest(folder, 2), manifest(clips)])


@pytest.fixture(scope="module")
def choice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ast")
    write_encoder(folder, "ast")
    return EncoderChoice(
        vision=VisionSpec("test_vit", pretrained=False),
        precision="fp32",
        num_frames=4,
        dtype="fp16",
        audio=AudioSpec(str(folder)),
        segments=AudioSegments(num_segments=3, segment_s=1.0),
    )


def _training_block(table):
    rows = TableRows(table)
    rows_SG = np.array(BATCHES)
    kinds = [rows.take(row_G[:1])[schema.KIND][0].as_py() for row_G in rows_SG]
    planned = StepRows(rows_SG, np.zeros_like(rows_SG), kinds)
    look_up = RowLookup(rows, seed=0, is_random=False)
    (plan,) = training_blocks(planned, first_step=0, world_size=1, steps_per_block=4)
    return look_up(plan)


def _decode_settings(spec):
    return DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames, audio=spec.audio)


def _write(table, folder, choice):
    spec = choice.load()[1]
    write_spec(str(folder), spec)
    decode, encode = DecodeShards(_decode_settings(spec)), EncodeShards(choice, str(folder), 8, "cpu")
    blocks = list(evaluation_blocks(TableRows(table), ROWS_PER_SHARD))
    for shard, block in enumerate(blocks):
        if not is_shard_finished(str(folder), shard, block):
            encode(decode(block))
    decode.close()
    write_index(str(folder), len(blocks))
    return open_cache(str(folder))


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sound_travels_with_its_rows(table):
    """Clips and images share a block; what has no sound takes no room on the way."""
    decode = DecodeRows(dataclasses.replace(DECODE, audio=SAMPLING))
    packed = decode(_training_block(table))
    sizes = [len(value.as_buffer()) for value in packed["audio_values"]]
    segment_bytes = 4 * SAMPLING.segment_samples
    assert sizes == [3 * segment_bytes, 0, segment_bytes, 0, 3 * segment_bytes, 0, 0, 0, 0]
    first, second, images = (unpack(part) for part in split_steps(packed))
    assert first.audio.shape == (3, 3, 16_000) and first.audio.dtype == np.float32 and first.audio.flags.writeable
    assert first.audio_valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert second.audio_valid.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert [failure.sample_id for failure in second.failures] == ["gone"]
    np.testing.assert_array_equal(second.audio[1], first.audio[0])
    assert images.audio.shape == (3, 3, 16_000) and not images.audio_valid.any()
    for batch in (first, second, images):
        assert not batch.audio[~batch.audio_valid].any()
    expected = decode._decoder.decode(kind="video", media=table[schema.MEDIA][2].as_py())
    np.testing.assert_array_equal(first.audio[0], expected.waveforms)
    decode.close()


def test_batches_without_sound_have_no_columns_for_it(table):
    decode = DecodeRows(DECODE)
    packed = decode(_training_block(table))
    decode.close()
    assert not [name for name in packed.column_names if "audio" in name]
    batch = unpack(next(split_steps(packed)))
    assert batch.audio is None and batch.audio_valid is None


def test_a_row_that_does_not_fit_is_a_fault_of_ours():
    rows = AudioRows(2, 3, 4)
    with pytest.raises(AssertionError, match="row 0: "):
        rows[0] = np.zeros((2, 4), np.float32), [True, False, False]
    with pytest.raises(AssertionError, match="row 0: float64 is not waveform"):
        rows[0] = np.zeros((1, 4)), [True, False, False]
    assert rows.columns()[AUDIO_VALID].to_pylist() == [[False] * 3] * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2**-10), ("bf16", 2**-7), ("int8", 1 / 127)])
def test_cached_sound_equals_encoded_sound(tmp_path, table, choice, dtype, tolerance):
    cache = _write(table, tmp_path / "cache", dataclasses.replace(choice, dtype=dtype))
    decode = DecodeRows(_decode_settings(cache.spec))
    plain = [unpack(part) for part in split_steps(decode(_training_block(table)))]
    decode.close()
    cached = [unpack(part) for part in split_steps(ReadFeatures(cache)(_training_block(locate(table, cache))))]
    audio_encoder = load_audio(choice.audio)
    assert plain[0].audio_valid.any()
    for one, other in zip(plain, cached, strict=True):
        assert other.failures == one.failures and other.audio.shape == (3, 3, audio_encoder.width)
        np.testing.assert_array_equal(other.audio_valid, one.audio_valid)
        expected = audio_encoder.features(torch.from_numpy(one.audio), torch.from_numpy(one.audio_valid)).numpy()
        np.testing.assert_allclose(other.audio, expected, atol=tolerance * max(np.abs(expected).max(), 1e-9))
        assert not other.audio[~other.audio_valid].any()


def test_a_cache_with_sound_serves_those_who_do_not_listen(tmp_path, table, choice):
    """Bit for bit the tokens of a cache that was made without sound, under the same fingerprint."""
    cache = _write(table, tmp_path / "cache", choice)
    plain = _write(table, tmp_path / "plain", dataclasses.replace(choice, audio=None))
    deaf = cache.without_audio()
    deaf.spec.require_same(plain.spec)
    one, other = (ReadFeatures(found)(_training_block(locate(table, found))) for found in (deaf, plain))
    assert one.column_names == other.column_names and "audio_values" not in one.column_names
    names = [name for name in one.column_names if not name.endswith("_s") and name != "fetched_bytes"]
    assert one.select(names).equals(other.select(names))
    assert deaf.row_bytes("video") == plain.row_bytes("video") < cache.row_bytes("video")
    assert cache.row_bytes("image") == plain.row_bytes("image")


def test_a_cache_without_sound_is_what_it_was(tmp_path, table, choice):
    spec = FeatureSpec(
        vision="v",
        weights="0" * 64,
        layer=-2,
        precision="fp32",
        preprocessing=PREPROCESSING,
        num_frames=4,
        sampling=Sampling(),
        num_tokens=5,
        width=8,
        dtype="fp16",
    )
    assert spec.fingerprint == OLD_FINGERPRINT
    _write(table, tmp_path / "plain", dataclasses.replace(choice, audio=None))
    assert open_shard(str(tmp_path / "plain"), 1).schema == SHARD_SCHEMA
    assert "audio" not in (tmp_path / "plain" / "features.json").read_text()


def test_the_fingerprint_of_a_cache_with_sound_is_what_it_was():
    """Recorded by the version before encoders became one value each."""
    preprocessing = {"height": 8, "width": 8, "resize_short_side": 8, "interpolation": "bicubic", "crop": "squash"}
    spec = FeatureSpec.from_dict(
        {
            "vision": "v",
            "weights": "0" * 64,
            "layer": -1,
            "precision": "bf16",
            "preprocessing": {**preprocessing, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
            "num_frames": 4,
            "sampling": {"strategy": "uniform", "fps": None, "times_s": []},
            "num_tokens": 5,
            "width": 8,
            "dtype": "int8",
            "audio": {"sample_rate_hz": 16000, "num_segments": 3, "segment_s": 1.0},
            "audio_encoder": "a",
            "audio_weights": "1" * 64,
            "audio_extractor": "2" * 64,
            "audio_width": 6,
        }
    )
    assert spec.fingerprint == "c2760ca55a4b87e1498f837b78edfb996247a3a540c13e2c7c1b6a6396d99f45"


def test_a_resumed_cache_with_sound_is_bit_equal(tmp_path, table, choice):
    _write(table, tmp_path / "whole", choice)
    folder = tmp_path / "resumed"
    _write(table, folder, choice)
    # As a kill leaves it: a shard of clips without its list of rows, and no index.
    (folder / "shard-00000001.parquet").unlink()
    (folder / "shard-00000001.arrow").write_bytes(b"half")
    (folder / "index.parquet").unlink()
    _write(table, folder, choice)
    assert _files(folder) == _files(tmp_path / "whole")


def test_what_decides_sound_is_in_the_fingerprint(tmp_path, choice):
    spec = choice.load()[1]
    write_spec(str(tmp_path), spec)
    assert read_spec(str(tmp_path)) == spec
    decode = _decode_settings(spec)
    spec.require_decoding(decode)
    with pytest.raises(UserError, match="audio: 3 segments of 1 s at 16000 Hz in the cache, 3 segments of 2 s .* here"):
        spec.require_decoding(dataclasses.replace(decode, audio=dataclasses.replace(SAMPLING, segment_s=2.0)))
    with pytest.raises(UserError, match="audio: None in the cache"):
        spec.without_audio().require_decoding(decode)
    dataclasses.replace(spec, audio_encoder="the same from another folder").require_same(spec)
    with pytest.raises(UserError, match=r"audio_weights: \w{12}… in the cache, 000000000000… here"):
        dataclasses.replace(spec, audio_weights="0" * 64).require_same(spec)
    with pytest.raises(UserError, match="does not fit .*audio: None in the cache"):
        spec.require_same(spec.without_audio())
    with pytest.raises(UserError, match="segment_s=9 is longer than the 2.57"):
        dataclasses.replace(choice, segments=dataclasses.replace(choice.segments, segment_s=9.0)).load()
