"""Sound in training: heard live or read from a cache, kept in the checkpoint, and heard again by those who load it."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.evaluate.job import decode_settings
from jobs.settings.data import AudioSettings, DataSettings
from pipelines.data.batches.batch import unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import evaluation_blocks
from pipelines.data.features.shard_encoder import DecodeShards, EncoderChoice
from pipelines.data.media.audio_sampling import AudioSampling, AudioSegments
from pipelines.data.media.samples import DecodeSettings, Limits, SampleDecoder
from pipelines.data.order.row_index import TableRows
from pipelines.data.storage import checkpoint_folders
from pipelines.evaluation.protocols.caption_shards import CaptionShards, caption_blocks
from pipelines.inference.decoding import decoding_of, waveforms_of
from pipelines.inference.files import caption_file
from pipelines.inference.models import load_captioner
from pipelines.training.records.accounting import Accounting
from pipelines.training.run.checkpoint import write_checkpoint
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.model_choice import AudioBranchOptions
from qformer.audio import load_audio
from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.mean import MeanConfig
from qformer.config import AudioSpec, GenerationSettings
from qformer.errors import UserError
from tests.pipelines.data.builders import manifest, stairs, write_clip, write_sounding_clip
from tests.pipelines.training.loops import backward, make_training
from tests.pipelines.training.step.test_loop import choice
from tests.tiny_audio import write_encoder

SEGMENTS = AudioSegments(num_segments=3, segment_s=1.0)
SAMPLING = SEGMENTS.at(16_000)
LOSS_TOLERANCE = 1e-5
"""Of a loss of 5.2, with tokens and vectors kept in float16; measured: less than a float32 tells apart."""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ast")
    write_encoder(folder, "ast")
    return dataclasses.replace(choice(2, ""), bridge=MeanConfig(), audio=AudioSpec(str(folder)), segments=SEGMENTS)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A clip with sound and one without."""
    folder = tmp_path_factory.mktemp("media")
    return [
        str(write_sounding_clip(folder / "tone.mp4", stairs(4, 44_100), rate_hz=44_100)),
        str(write_clip(folder / "mute.mp4", [90] * 20)),
    ]


def _run(chosen, features=None):
    return TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None, features=features)


def _manifest(media):
    return manifest(
        [{"sample_id": name, "media": name, "kind": "video", "captions": ["a small red circle"]} for name in media]
    )


def _batch(run, media):
    decode = DecodeSettings(preprocessing=run.preprocessing, num_frames=run.choice.num_frames, audio=run.audio_sampling)
    (block,) = evaluation_blocks(TableRows(_manifest(media)), 8)
    operator = DecodeRows(decode)
    batch = unpack(operator(block))
    operator.close()
    return batch


def _spec(chosen):
    return EncoderChoice(
        vision=chosen.vision,
        precision="fp32",
        num_frames=chosen.num_frames,
        dtype="fp16",
        audio=chosen.audio,
        segments=SEGMENTS,
    ).load()[1]


def _kept(run, chosen, batch):
    """The batch as a cache keeps it."""
    ears = load_audio(chosen.audio)
    vectors = ears.features(torch.from_numpy(batch.audio), torch.from_numpy(batch.audio_valid))
    tokens = run.encode(batch)
    return dataclasses.replace(batch, images=tokens.half().numpy(), audio=vectors.half().numpy())


def test_a_run_hears_files_and_caches_alike(chosen, media):
    live = _run(chosen)
    assert live.audio_sampling == SAMPLING and set(live.frozen) == {"audio", "language", "vision"}
    batch = _batch(live, media)
    assert batch.audio_valid.tolist() == [[True] * 3, [False] * 3]
    kept, cached = _kept(live, chosen, batch), _run(chosen, _spec(chosen))
    assert cached.fingerprints == live.fingerprints and set(cached.frozen) == {"language"}
    assert cached.info(3) == live.info(3)
    for run in (live, cached):
        run.stage.trainables.eval()
    losses = [backward(run.stage, given)["lm"] for run, given in ((live, batch), (cached, kept))]
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_TOLERANCE)
    # What is heard matters: another sound is another loss (measured 2e-3 aside).
    softer = dataclasses.replace(batch, audio=np.flip(batch.audio, axis=2).copy() * 0.1)
    assert abs(backward(live.stage, softer)["lm"] - losses[0]) > 50 * LOSS_TOLERANCE


def test_a_run_without_ears_reads_the_same_cache(chosen, media):
    live = _run(chosen)
    kept = _kept(live, chosen, _batch(live, media))
    deaf = _run(dataclasses.replace(chosen, audio=None), _spec(chosen))
    assert deaf.audio_sampling is None and "audio" not in deaf.fingerprints
    assert np.isfinite(backward(deaf.stage, dataclasses.replace(kept, audio=None, audio_valid=None))["lm"])


def test_vectors_of_an_encoder_that_nobody_can_load_are_heard_from_a_cache(chosen, media):
    """ImageBind-shaped: 1024 values a segment, made elsewhere. The frames' encoder is still compared."""
    live = _run(chosen)
    batch = _batch(live, media)
    vectors = np.random.default_rng(0).standard_normal((*batch.audio_valid.shape, 1024)).astype(np.float16)
    vectors[~batch.audio_valid] = 0
    kept = dataclasses.replace(_kept(live, chosen, batch), audio=vectors)
    spec = dataclasses.replace(_spec(chosen), audio_encoder="imagebind_huge", audio_weights="1" * 64, audio_width=1024)
    with pytest.raises(UserError, match="audio_weights: 111111111111… in the cache"):
        _run(chosen, spec)
    run = _run(dataclasses.replace(chosen, audio=AudioSpec("features")), spec)
    assert run.audio_branch.encoder_width == 1024 and run.fingerprints["audio"] == "1" * 64
    assert np.isfinite(backward(run.stage, kept)["lm"])
    with pytest.raises(UserError, match="weights: "):
        untrained = dataclasses.replace(chosen.vision, pretrained=False)
        _run(dataclasses.replace(chosen, audio=AudioSpec("features"), vision=untrained), spec)


def test_a_cache_of_another_sound_is_refused(chosen):
    spec = _spec(chosen)
    with pytest.raises(UserError, match="audio: 3 segments of 1 s at 16000 Hz in the cache, 4 segments of 1 s"):
        _run(dataclasses.replace(chosen, segments=AudioSegments(num_segments=4, segment_s=1.0)), spec)
    with pytest.raises(UserError, match=r"audio_weights: \w+… in the cache, \w+… here"):
        _run(dataclasses.replace(chosen, audio=dataclasses.replace(chosen.audio, pretrained=False)), spec)


def test_segments_that_the_encoder_cannot_hear_are_refused(chosen):
    with pytest.raises(UserError, match="data.audio.segment_s=9 is longer than the 2.575 s"):
        _run(dataclasses.replace(chosen, segments=AudioSegments(num_segments=1, segment_s=9.0)))


@pytest.mark.parametrize(
    "part", ["frames.positions.table_MD", "frames.qformer.query_tokens", "language_projection.bias"]
)
def test_all_of_the_bridge_is_held_where_the_branch_is_trained_alone(chosen, part):
    run = _run(dataclasses.replace(chosen, bridge=CascadedConfig(), audio_branch=AudioBranchOptions(trains_alone=True)))
    assert {name.partition(".")[0] for name in run.trainable_names} == {"audio"}
    run.assert_frozen()
    with torch.no_grad():
        dict(run.stage.trainables.named_parameters())[part].add_(1.0)
    with pytest.raises(RuntimeError, match="weights of the bridge that are not trained changed"):
        run.assert_frozen()


def test_joint_sound_needs_a_segment_for_every_frame(chosen):
    info = dataclasses.replace(_run(chosen).info(1), num_frames=3)
    info = dataclasses.replace(info, audio_branch=dataclasses.replace(info.audio_branch, is_joint=True))
    assert decoding_of(info, Limits()).audio == SAMPLING
    told = "this bridge reads both together, one segment a frame; leave num_frames and data.audio as in training"
    with pytest.raises(UserError, match=f"num_frames=8 with 3 segments of sound: {told}"):
        decoding_of(info, Limits(), num_frames=8)
    with pytest.raises(UserError, match=f"num_frames=3 with 2 segments of sound: {told}"):
        decode_settings(DataSettings(manifest="m", audio=AudioSettings(num_segments=2)), info)
    with pytest.raises(UserError, match="data.audio: audio of 100000 segments of 1 s"):
        decode_settings(
            DataSettings(manifest="m", audio=AudioSettings(num_segments=100_000, segment_s=0.001)), info
        ) if False else decoding_of(info, Limits(), segments={"num_segments": 100_000})


def test_whoever_loads_the_checkpoint_hears_as_the_training_did(chosen, media, tmp_path):
    run = _run(chosen)
    checkpoint = run.checkpoint(1, make_training(run), Accounting(), settings="stage: 2\n")
    write_checkpoint(str(tmp_path / "run"), checkpoint)
    captioner = load_captioner(checkpoint_folders.whole_checkpoint(str(tmp_path / "run")))
    decode = decoding_of(captioner.info, Limits())
    assert decode == DecodeSettings(
        preprocessing=run.preprocessing, num_frames=chosen.num_frames, audio=run.audio_sampling
    )
    data = {"manifest": "m"}
    assert decode_settings(DataSettings(**data), captioner.info) == decode
    fewer = decode_settings(DataSettings(**data, audio=AudioSettings(num_segments=2)), captioner.info)
    assert fewer.audio == AudioSampling(sample_rate_hz=16_000, num_segments=2, segment_s=1.0)

    batch = _batch(run, media)
    pixels, frame_valid = torch.from_numpy(batch.images), torch.from_numpy(batch.frame_valid)
    prompts = captioner.soft_prompts(pixels, frame_valid=frame_valid, audio=waveforms_of(batch))
    # The clip without sound has no soft prompts of any: nobody takes it for silence.
    assert len(prompts[0]) - len(prompts[1]) == captioner.info.audio_branch.num_queries
    tokens = captioner.encoder.features(pixels)
    again = captioner.soft_prompts_of_tokens(tokens, frame_valid=frame_valid, audio=waveforms_of(batch))
    assert all(torch.equal(one, two) for one, two in zip(prompts, again, strict=True))
    deaf = captioner.soft_prompts(pixels, frame_valid=frame_valid)
    torch.testing.assert_close(deaf[1], prompts[1])

    heard = []
    true_features = captioner.audio_encoder.features
    captioner.audio_encoder.features = lambda *args: heard.append(args[1].tolist()) or true_features(*args)
    decoder, generation = SampleDecoder(decode), GenerationSettings(max_new_tokens=3)
    texts = [caption_file(captioner, decoder, name, generation) for name in media]
    decoder.close()
    assert heard == [[[True] * 3], [[False] * 3]]

    # A whole corpus is heard as its single files are.
    folder = str(tmp_path / "captions")
    checkpoint = str(checkpoint_folders.whole_checkpoint(str(tmp_path / "run")))
    actor = CaptionShards(checkpoint, folder, generation, 4096, 4, "cpu")
    actor._captioner.audio_encoder.features = captioner.audio_encoder.features
    decode_shard = DecodeShards(decode)
    (shard,) = caption_blocks(_manifest(media), decode, "")
    actor(decode_shard(shard))
    assert heard[2:] == [[[True] * 3, [False] * 3]]
    assert pq.read_table(tmp_path / "captions" / "shard-00000000.parquet")["text"].to_pylist() == texts
