"""The feature cache: exact storage, refusals, resumption, and the same training as on pixels."""

import dataclasses
import io

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data import schema, storage
from pipelines.data.batches.batch import split_steps, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import RowLookup, evaluation_blocks, training_blocks
from pipelines.data.batches.token_codec import decode_tokens, encode_tokens
from pipelines.data.failures import Failure
from pipelines.data.features.cache import FeatureCache, ReadFeatures, locate, open_cache
from pipelines.data.features.shard_encoder import DecodeShards, EncoderChoice, EncodeShards
from pipelines.data.features.shards import file_states, is_shard_finished, write_index, write_quarantine, write_shard
from pipelines.data.features.spec import write_spec
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings, Limits
from pipelines.data.order.global_batches import PADDING, StepRows
from pipelines.data.order.row_index import TableRows
from pipelines.data.storage import retries
from pipelines.data.storage.retries import with_retries
from qformer.config import VisionSpec
from qformer.errors import UserError
from tests.pipelines.data.builders import image_manifest, manifest, write_clip

CHOICE = EncoderChoice(vision=VisionSpec("test_vit", pretrained=False), precision="fp32", num_frames=4, dtype="fp16")
ROWS_PER_SHARD = 3


@pytest.fixture(scope="module")
def encoder():
    return CHOICE.load()


def _table(folder) -> pa.Table:
    """Four images, one of them missing, and a clip."""
    images = image_manifest(folder, 4)
    (folder / "2.jpg").unlink()
    clip = write_clip(folder / "c.mp4", [100] * 3)  # fewer frames than are sampled
    return pa.concat_tables([images, manifest([{"sample_id": "clip", "media": str(clip), "kind": "video"}])])


def _blocks(table):
    return list(evaluation_blocks(TableRows(table), ROWS_PER_SHARD))


def _finished(table, folder):
    return [is_shard_finished(str(folder), shard, block) for shard, block in enumerate(_blocks(table))]


def _write(table, folder, encoder, choice=CHOICE) -> FeatureCache:
    spec = choice.load()[1]
    write_spec(str(folder), spec)
    decode = DecodeShards(DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames))
    encode = EncodeShards(choice, str(folder), 2, "cpu")
    blocks = _blocks(table)
    for shard, block in enumerate(blocks):
        if not is_shard_finished(str(folder), shard, block):
            encode(decode(block))
    write_index(str(folder), len(blocks))
    return open_cache(str(folder))


def _training_blocks(table, batches):
    rows = TableRows(table)
    rows_SG = np.array(batches)
    kinds = [rows.take(row_G[:1])[schema.KIND][0].as_py() for row_G in rows_SG]
    planned = StepRows(rows_SG, np.zeros_like(rows_SG), kinds)
    look_up = RowLookup(rows, seed=0, is_random=False)
    return [look_up(plan) for plan in training_blocks(planned, first_step=0, world_size=1, steps_per_block=4)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_tokens_survive_storage_within_the_types_rounding(dtype, tolerance):
    tokens = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32) * 40
    back = decode_tokens(encode_tokens(tokens, dtype), dtype).astype(np.float32)
    largest = np.abs(tokens).max(axis=-1, keepdims=True)
    assert np.all(np.abs(back - tokens) <= tolerance * 1.001 * largest)
    assert np.abs(back - tokens).max() > 0
    assert not encode_tokens(np.zeros((1, 2, 8), np.float32), dtype).any()


def test_bf16_rounds_as_torch_does():
    tokens = np.random.default_rng(1).standard_normal(1000).astype(np.float32)[None]
    expected = torch.from_numpy(tokens).bfloat16().float().numpy()
    np.testing.assert_array_equal(decode_tokens(encode_tokens(tokens, "bf16"), "bf16"), expected)


def test_what_fp16_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="more than fp16 holds; store bf16"):
        encode_tokens(np.full((1, 1, 2), 70_000, np.float32), "fp16")
    with pytest.raises(ValueError, match="not finite"):
        encode_tokens(np.full((1, 1, 2), np.nan, np.float32), "bf16")


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_cached_batches_equal_encoded_pixels(tmp_path, encoder, dtype):
    """Order, captions, padding, failures and tokens are those of the pixels, whatever shard a row lies in."""
    table = _table(tmp_path)
    cache = _write(table, tmp_path / "cache", encoder, dataclasses.replace(CHOICE, dtype=dtype))
    batches = [[3, 2, PADDING], [4, PADDING, PADDING], [1, 0, 3]]
    model, spec = encoder
    decode = DecodeRows(DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames))
    (plain_block,), (cached_block,) = (_training_blocks(rows, batches) for rows in (table, locate(table, cache)))
    plain = [unpack(part) for part in split_steps(decode(plain_block))]
    cached = [unpack(part) for part in split_steps(ReadFeatures(cache)(cached_block))]
    for one, other in zip(plain, cached, strict=True):
        assert other.sample_ids == one.sample_ids and other.captions == one.captions
        assert other.failures == one.failures
        np.testing.assert_array_equal(other.frame_valid, one.frame_valid)
        np.testing.assert_array_equal(other.is_valid, one.is_valid)
        np.testing.assert_array_equal(other.image_ids, one.image_ids)
        expected = model(torch.from_numpy(one.images)).float().numpy()
        tolerance = np.abs(expected).max() * (2**-10 if dtype == "fp16" else 1 / 127)
        valid = one.is_valid
        np.testing.assert_allclose(other.images[valid], expected[valid], atol=tolerance)
        assert other.images.shape == expected.shape and not other.images[~valid].any()
    assert [failure.error_class for failure in cached[0].failures] == ["missing"]
    assert not cached[1].frame_valid.all()


def test_a_resumed_cache_is_bit_equal_and_leaves_whole_shards_alone(tmp_path, encoder):
    table = _table(tmp_path)
    _write(table, tmp_path / "whole", encoder)
    folder = tmp_path / "resumed"
    _write(table, folder, encoder)
    # As a kill leaves it: a shard without its list of rows, and no index.
    (folder / "shard-00000001.parquet").unlink()
    (folder / "shard-00000001.arrow").write_bytes(b"half")
    (folder / "index.parquet").unlink()
    untouched = (folder / "shard-00000000.arrow").stat().st_mtime_ns
    with pytest.raises(UserError, match="is not finished; run `qformer features"):
        open_cache(str(folder))
    _write(table, folder, encoder)
    assert (folder / "shard-00000000.arrow").stat().st_mtime_ns == untouched
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "shard-00000001.arrow" in files


def test_a_changed_row_makes_its_shard_anew(tmp_path, encoder):
    table = _table(tmp_path)
    folder = str(tmp_path / "cache")
    _write(table, folder, encoder)
    rows = table.to_pylist()
    rows[0]["media"] = str(tmp_path / "1.jpg")
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    assert _finished(changed, folder) == [False, True, True]


def test_a_file_that_was_replaced_in_place_makes_its_shard_anew(tmp_path, encoder):
    table = _table(tmp_path)
    _write(table, tmp_path / "cache", encoder)
    assert _finished(table, tmp_path / "cache") == [True, True, True]
    (tmp_path / "1.jpg").unlink()
    assert _finished(table, tmp_path / "cache") == [True, True, True], "what it showed is still known"
    (tmp_path / "1.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    assert _finished(table, tmp_path / "cache") == [False, True, True]
    (tmp_path / "2.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())  # was missing
    _write(table, tmp_path / "cache", encoder)
    assert _finished(table, tmp_path / "cache") == [True, True, True]
    assert not len(write_quarantine(str(tmp_path / "cache"), 3))


def test_the_state_of_a_tar_member_is_its_shards(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 9)
    one, member, *others = file_states([*(f"{tmp_path}/a.tar{end}" for end in ("", "#offset=3&length=2")), None, "/no"])
    assert one == member and one.startswith("9/") and others == [None, None]
    assert file_states(["s3://bucket/a.jpg", "bad\0name"]) == [None, None]


@pytest.mark.parametrize("error_class", ["transient", "timeout", "corrupt"])
def test_only_failures_that_may_pass_are_tried_again(tmp_path, encoder, error_class):
    table = _table(tmp_path)
    block, spec = _blocks(table)[0], encoder[1]
    decode = DecodeRows(DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames))
    batch = unpack(decode(block))
    failure = Failure("s2", str(tmp_path / "2.jpg"), "read", error_class, "503", 4)
    tokens = [np.ones((1, spec.num_tokens, spec.width), np.float32) if ok else None for ok in batch.is_valid]
    states = file_states(block[schema.MEDIA].to_pylist())
    write_shard(str(tmp_path), dataclasses.replace(batch, failures=[failure]), tokens, "fp16", states)
    assert is_shard_finished(str(tmp_path), 0, block) == (error_class == "corrupt")
    (row,) = write_quarantine(str(tmp_path), 2).to_pylist()
    assert row == {**dataclasses.asdict(failure), "epoch": 0}
    assert pq.read_table(tmp_path / "quarantine.parquet").to_pylist() == [row]


def test_a_shard_that_is_being_replaced_is_unfinished(tmp_path, encoder, monkeypatch):
    """Killed between the shard and its list of rows: the old list must not speak for the new shard."""
    table = _table(tmp_path)
    _write(table, tmp_path / "cache", encoder)
    monkeypatch.setattr("pipelines.data.features.shards.write_table", lambda table, path: None)
    spec = encoder[1]
    decode = DecodeShards(DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames))
    EncodeShards(CHOICE, str(tmp_path / "cache"), 2, "cpu")(decode(_blocks(table)[1]))
    assert _finished(table, tmp_path / "cache") == [True, False, True]


def test_a_cache_that_changes_under_its_training_stops_it(tmp_path, encoder):
    table = _table(tmp_path)
    cache = _write(table, tmp_path / "cache", encoder)
    (block,) = _training_blocks(locate(table, cache), [[0, 1]])
    rows = table.to_pylist()
    rows[0], rows[1] = {**rows[0], "sample_id": "s1"}, {**rows[1], "sample_id": "s0"}
    _write(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "cache", encoder)
    # The ids are there again, in turned places; then the ids are right, and the media are not.
    with pytest.raises(UserError, match="row 0 is 's1' of other media, not sample 's0'; .* run `qformer features"):
        ReadFeatures(cache)(block)
    rows = table.to_pylist()
    rows[0]["media"] = str(tmp_path / "1.jpg")
    _write(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "cache", encoder)
    with pytest.raises(UserError, match="row 0 is 's0' of other media, not sample 's0'"):
        ReadFeatures(cache)(block)
    (tmp_path / "cache" / "shard-00000000.arrow").unlink()
    with pytest.raises(UserError, match="sample 's0' is missing .*; the cache was changed or damaged"):
        ReadFeatures(cache)(block)


class _FailingFileSystem(MemoryFileSystem):
    """A store whose requests fail as often as `left` says, also in the middle of a file."""

    protocol = "failing"
    store = {}
    pseudo_dirs = [""]
    left = {"open": 0, "read": 0}

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))

    @classmethod
    def fail(cls, what):
        if cls.left[what]:
            cls.left[what] -= 1
            raise ConnectionResetError("reset by peer")

    def _open(self, path, mode="rb", **options):
        self.fail("open")
        if mode != "rb":
            return super()._open(path, mode, **options)
        with super()._open(path, mode, **options) as file:
            return _TiredFile(file.getvalue())


class _TiredFile(io.BytesIO):
    def read(self, size=-1):
        _FailingFileSystem.fail("read")
        return super().read(size)


def test_a_store_that_fails_now_and_then_is_asked_again(tmp_path, encoder, monkeypatch):
    """Both when the cache is written and when training reads it."""
    fsspec.register_implementation("failing", _FailingFileSystem, clobber=True)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(_FailingFileSystem, "left", {"open": 0, "read": 0})
    table, folder = _table(tmp_path), f"failing://{tmp_path.name}/cache"
    spec = encoder[1]
    decode = DecodeShards(DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames))
    encode = EncodeShards(CHOICE, folder, 2, "cpu")
    blocks = _blocks(table)
    for block in blocks:
        decoded = decode(block)
        _FailingFileSystem.left = {"open": 2, "read": 0}
        encode(decoded)
        assert _FailingFileSystem.left["open"] == 0
    decode.close()
    write_spec(folder, spec)
    write_index(folder, len(blocks))
    cache = open_cache(folder)
    (wanted,) = _training_blocks(locate(table, cache), [[0, 1]])
    expected, reader = unpack(ReadFeatures(cache)(wanted)), ReadFeatures(cache)
    for failures in ({"open": 2, "read": 2}, {"open": 0, "read": 2}):  # at the first look, and of an open file
        _FailingFileSystem.left = dict(failures)
        batch = unpack(reader(wanted))
        assert _FailingFileSystem.left == {"open": 0, "read": 0} and np.array_equal(batch.images, expected.images)
    monkeypatch.setattr(with_retries, "__kwdefaults__", {"budget_s": 0.05})
    _FailingFileSystem.left = {"open": 0, "read": 10**6}
    with pytest.raises(UserError, match="sample 's0' cannot be read .*reset by peer"):
        reader(wanted)


def test_a_cache_that_does_not_fit_is_refused(tmp_path, encoder):
    table = _table(tmp_path)
    cache = _write(table, tmp_path / "cache", encoder)
    more = pa.concat_tables([table, manifest([{"sample_id": "new", "media": "/n.jpg"}])])
    with pytest.raises(UserError, match="lacks 1 rows, 'new' first; run `qformer features"):
        locate(more, cache)
    rows = table.to_pylist()
    rows[3]["media"] = "/elsewhere.jpg"
    with pytest.raises(UserError, match="made of other files for 1 rows, 's3' first"):
        locate(pa.Table.from_pylist(rows, schema=table.schema), cache)
    with pytest.raises(UserError, match="holds no feature cache; run `qformer features"):
        open_cache(str(tmp_path))
    spec = encoder[1]
    renamed = dataclasses.replace(spec, vision="the same encoder from another folder")
    renamed.require_same(spec)
    with pytest.raises(UserError, match="num_frames: 4 in the cache, 8 here"):
        dataclasses.replace(spec, num_frames=8).require_same(spec)
    with pytest.raises(UserError, match=f"weights: {spec.weights[:12]}… in the cache"):
        dataclasses.replace(spec, weights="0" * 64).require_same(spec)


def test_the_fingerprint_covers_all_that_decides_pixels(encoder):
    """A new field of DecodeSettings must enter FeatureSpec, or be named as one without effect: both fail here."""
    spec = encoder[1]
    decode = DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames)
    spec.require_decoding(decode)
    spec.require_decoding(dataclasses.replace(decode, limits=Limits(max_pixels=5)))
    with pytest.raises(UserError, match="num_frames: 4 in the cache, 5 here"):
        spec.require_decoding(dataclasses.replace(decode, num_frames=5))
    with pytest.raises(UserError, match="sampling: .*uniform.* in the cache, .*key_frames.* here"):
        spec.require_decoding(dataclasses.replace(decode, sampling=Sampling(strategy="key_frames")))
    with pytest.raises(UserError, match="'head_tail' draws other frames in every epoch"):
        spec.require_decoding(dataclasses.replace(decode, sampling=Sampling(strategy="head_tail")))
    other = dataclasses.replace(spec.preprocessing, crop="squash")
    with pytest.raises(UserError, match="preprocessing: .* in the cache"):
        spec.require_decoding(dataclasses.replace(decode, preprocessing=other))


def test_a_forgotten_field_of_decoding_fails_loudly(encoder, monkeypatch):
    longer = dataclasses.make_dataclass("DecodeSettings", [("gamma", float, 2.2)], bases=(DecodeSettings,), frozen=True)
    monkeypatch.setattr("pipelines.data.features.spec.DecodeSettings", longer)
    with pytest.raises(TypeError, match="DecodeSettings.gamma decides what a sample looks like"):
        encoder[1].require_decoding(longer(preprocessing=encoder[1].preprocessing, num_frames=4))


def test_shards_lie_on_any_filesystem(tmp_path, encoder):
    """fsspec's memory filesystem stands for every remote one."""
    table = _table(tmp_path)
    cache = _write(table, "memory://features-test", encoder)
    (block,) = _training_blocks(locate(table, cache), [[0, 1]])
    batch = unpack(ReadFeatures(cache)(block))
    assert batch.is_valid.all() and batch.images.any()


def test_write_shard_stores_failures_beside_tokens(tmp_path, encoder):
    table = _table(tmp_path)
    spec = encoder[1]
    block = next(evaluation_blocks(TableRows(table), 10))
    decode = DecodeRows(DecodeSettings(preprocessing=spec.preprocessing, num_frames=spec.num_frames))
    batch = unpack(decode(block))
    tokens = [np.ones((1, spec.num_tokens, spec.width), np.float32) if ok else None for ok in batch.is_valid]
    write_shard(str(tmp_path), batch, tokens, "fp16", [None] * 4)
    stored = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard-00000000.arrow")))
    assert stored.num_record_batches == 4
    assert stored.get_batch(2)[schema.ERROR_CLASS][0].as_py() == "missing"
    assert storage.exists(str(tmp_path / "shard-00000000.parquet"))
