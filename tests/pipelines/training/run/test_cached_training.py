"""Training on the feature cache is training on pixels: the real loop, twice over the same real files."""

import numpy as np
import pytest
import torch

from jobs.demo.world.corpus import write_world
from pipelines.data import schema
from pipelines.data.batches.batch import split_steps, unpack
from pipelines.data.batches.plan import RowLookup, training_blocks
from pipelines.data.corpus.manifest import read_manifest
from pipelines.data.features.cache import ReadFeatures, locate, open_cache
from pipelines.data.features.shard_encoder import DecodeShards, EncoderChoice, EncodeShards
from pipelines.data.features.shards import shard_blocks, write_index
from pipelines.data.features.spec import write_spec
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import TableRows
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.vocabulary import learn_text_tokenizer
from qformer.config import VisionSpec
from tests.pipelines.training.loops import make_loop
from tests.pipelines.training.step.test_loop import MODELS, choice, settings

SEED, BATCH, STEPS = 5, 8, 8
LOSS_GAP = 1e-3
"""fp16 rounds the tokens to 11 bits; 7 steps were measured to differ by at most 1e-6 in these small models."""
ENCODER = EncoderChoice(vision=VisionSpec(str(MODELS / "vision")), precision="fp32", num_frames=2, dtype="fp16")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images and clips with a few broken ones, their cache, and a tokenizer of their captions."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_images=40, num_clips=16, num_test_images=2, num_test_clips=2, seed=3)
    manifest = read_manifest(str(folder / "manifest.jsonl"), "train", needs_captions=True)
    spec = ENCODER.load()[1]
    decode = DecodeSettings(preprocessing=spec.preprocessing, num_frames=2)
    cache = str(folder / "cache")
    write_spec(cache, spec)
    decode_rows, encode = DecodeShards(decode), EncodeShards(ENCODER, cache, 16, "cpu")
    shards = shard_blocks(manifest, decode)
    for shard in shards:
        encode(decode_rows(shard))
    write_index(cache, len(shards))
    captions = [text for texts in manifest[schema.CAPTIONS].to_pylist() for text in texts]
    learn_text_tokenizer(lambda: captions, folder / "words")
    yield manifest, decode_rows, open_cache(cache), folder / "words"
    decode_rows.close()


def _losses(world, stage, is_cached):
    manifest, decode_rows, cache, tokenizer = world
    rows = locate(manifest, cache) if is_cached else manifest
    operator = ReadFeatures(cache) if is_cached else decode_rows
    corpus = Corpus([MixtureSource("world", TableRows(rows))])
    order = Order(corpus.streams("proportional"), SEED, BATCH)
    num_steps = min(STEPS, order.steps_per_epoch)
    plans = training_blocks(order.at(np.arange(num_steps)), first_step=0, world_size=1, steps_per_block=1)
    look_up = RowLookup(corpus, seed=SEED, is_random=False)
    batches = (unpack(step) for plan in plans for step in split_steps(operator(look_up(plan))))
    features = cache.spec if is_cached else None
    run = TrainingRun(
        choice(stage, tokenizer), torch.device("cpu"), precision="fp32", seed=SEED, init_from=None, features=features
    )
    logged = []
    changes = {"steps": num_steps, "log_every": 1, "checkpoint_every": 1000, "rows_per_epoch": len(manifest)}
    loop = make_loop(run, settings(**changes), log=logged.append)
    loop.run(batches, 0)
    return logged, loop, run


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_on_the_fp16_cache_are_those_on_pixels(world, stage):
    (pixels, on_pixels, run), (cached, on_cache, _) = (_losses(world, stage, is_cached) for is_cached in (False, True))
    assert len(pixels) == len(cached) >= 6
    names = [name for name in pixels[0] if name.startswith("loss/")]
    for one, other in zip(pixels, cached, strict=True):
        for name in names:
            assert other[name] == pytest.approx(one[name], abs=LOSS_GAP), (name, one["step"])
    # The losses move by far more than they differ by, and the cache was not the pixels by accident.
    assert abs(pixels[0]["loss/total"] - pixels[-1]["loss/total"]) > 10 * LOSS_GAP
    assert any(one["loss/total"] != other["loss/total"] for one, other in zip(pixels, cached, strict=True))
    assert on_pixels.accounting.quarantined.keys() == on_cache.accounting.quarantined.keys() != set()

    # What the stages took is in the log and in the sums.
    assert all(record["data/decode_s"] > 0 for record in pixels)
    assert all(record["data/decode_s"] == 0 < record["data/fetch_s"] for record in cached)
    told = on_pixels.times.combined(run.encode.seconds)
    assert told["decode_s"] == pytest.approx(sum(record["data/decode_s"] for record in pixels))
    assert 0 < told["encode_s"] < told["wall_s"] and told["rows"] == on_pixels.accounting.rows_in
