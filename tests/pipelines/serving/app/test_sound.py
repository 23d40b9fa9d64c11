"""Clips with sound through the encoder deployment, in this process: served soft prompts are the offline ones."""

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.folders.checkpoint import open_checkpoint
from pipelines.data.media.audio_sampling import AudioSegments
from pipelines.data.media.samples import Limits, SampleDecoder
from pipelines.data.storage import checkpoint_folders
from pipelines.inference.decoding import decoding_of, waveforms_of_clip
from pipelines.inference.models import load_captioner
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import FetchPolicy
from pipelines.serving.contract.uploads import Upload
from pipelines.serving.workers.adapter_models import PromptAdapter, load_adapter, load_backbone
from pipelines.serving.workers.encoder import EncoderWorker
from pipelines.serving.workers.media import MediaWorker
from pipelines.training.records.accounting import Accounting
from pipelines.training.run.checkpoint import write_checkpoint
from pipelines.training.run.model import TrainingRun
from qformer.bridges.cascaded import CascadedConfig
from qformer.config import AudioSpec
from qformer.conversion.checkpoint import INFO_FILE
from qformer.errors import UserError
from tests.pipelines.data.builders import stairs, write_clip, write_sounding_clip
from tests.pipelines.training.loops import make_training
from tests.pipelines.training.step.test_loop import choice
from tests.tiny_audio import write_encoder

TOLERANCE = 1e-5
"""Of soft prompts up to 2, alone against in a batch; measured: 1e-6."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a cascaded bridge that hears, as it begins; a tiny AST lies beside it."""
    folder = tmp_path_factory.mktemp("hearing")
    write_encoder(folder / "ast", "ast")
    segments = AudioSegments(num_segments=3, segment_s=1.0)
    chosen = dataclasses.replace(
        choice(2, ""), num_frames=4, bridge=CascadedConfig(), audio=AudioSpec(str(folder / "ast")), segments=segments
    )
    run = TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None)
    written = run.checkpoint(1, make_training(run), Accounting(), settings="stage: 2\n")
    write_checkpoint(str(folder / "run"), written)
    return checkpoint_folders.whole_checkpoint(str(folder / "run"))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two clips with sound, the second shorter than a segment, and between them one without a track."""
    folder = tmp_path_factory.mktemp("media")
    return [
        write_sounding_clip(folder / "tone.mp4", stairs(4, 44_100), rate_hz=44_100),
        write_clip(folder / "mute.mp4", [*range(20, 220, 10)]),
        write_sounding_clip(folder / "short.mp4", stairs(0.5, 16_000), rate_hz=16_000),
    ]


class Encoder(EncoderWorker):
    """Of one adapter, which is there."""

    held: PromptAdapter

    async def adapter(self, key):
        return self.held


def served(checkpoint, media):
    """Soft prompts of clips that come at the same time, and how many of them each pass took."""
    folder, info = open_checkpoint(str(checkpoint))
    adapter = Adapter.of(info, name="hearing", version="1", folder=folder)
    encoder, passes = Encoder(adapter.encoder, 64, use_gpu=False), []
    encoder.held = load_adapter(folder, encoder._encoder, "cpu")
    encoder._batcher._observe = lambda works: passes.append(len(works))

    async def ask():
        worker = MediaWorker(Limits(), FetchPolicy(), 1)
        clips = [await worker.decode(Upload("video", path.read_bytes()), adapter) for path in media]
        return await asyncio.gather(*(encoder.soft_prompts(adapter, clip, "") for clip in clips))

    return asyncio.run(ask()), passes


def offline(checkpoint, media):
    captioner = load_captioner(Path(checkpoint))
    decoder = SampleDecoder(decoding_of(captioner.info, Limits()))
    try:
        clips = [decoder.decode(kind="video", media=str(path)) for path in media]
    finally:
        decoder.close()
    return [
        captioner.soft_prompts(
            torch.tensor(clip.pixels)[None],
            frame_valid=torch.tensor(clip.frame_valid)[None],
            audio=waveforms_of_clip(clip),
        )[0].numpy()
        for clip in clips
    ]


def test_served_soft_prompts_of_clips_with_and_without_sound_are_the_offline_ones(checkpoint, media):
    prompts, passes = served(checkpoint, media)
    assert passes == [3]
    heard, mute, short = (len(rows) for rows in prompts)
    assert heard == short > mute  # nobody takes a missing track for silence
    for here, there in zip(prompts, offline(checkpoint, media), strict=True):
        np.testing.assert_allclose(here, there, atol=TOLERANCE)
    sound = slice(mute, None)
    assert np.abs(prompts[0][sound] - prompts[2][sound]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("change", ["rate", "width"])
def test_an_encoder_of_sound_that_is_another_than_in_training_is_refused(checkpoint, tmp_path, change):
    folder, ast = tmp_path / "checkpoint", tmp_path / "ast"
    shutil.copytree(checkpoint, folder)
    info = json.loads((folder / INFO_FILE).read_text())
    shutil.copytree(info["audio"]["name"], ast)
    (folder / INFO_FILE).write_text(json.dumps({**info, "audio": {"name": str(ast)}}))
    if change == "rate":
        file = ast / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "sampling_rate": 8000}))
        told = "is 32 wide and hears 8000 Hz, the bridge 32 and 16000 Hz; it is another model than in training"
    else:
        write_encoder(ast, "whisper", width=64)
        told = "is 64 wide and hears 16000 Hz, the bridge 32 and 16000 Hz"
    encoder = load_backbone(Adapter.of(open_checkpoint(str(folder))[1], name="", version="", folder="").encoder, "cpu")
    for load in (lambda: load_captioner(folder), lambda: load_adapter(str(folder), encoder, "cpu")):
        with pytest.raises(UserError, match=told):
            load()


def test_a_bridge_that_heard_vectors_of_a_cache_cannot_hear_files(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    info = json.loads((folder / INFO_FILE).read_text())
    (folder / INFO_FILE).write_text(json.dumps({**info, "audio": {"name": "features"}}))
    encoder = load_backbone(Adapter.of(open_checkpoint(str(folder))[1], name="", version="", folder="").encoder, "cpu")
    for load in (lambda: load_captioner(folder), lambda: load_adapter(str(folder), encoder, "cpu")):
        with pytest.raises(UserError, match="trained with model.audio=features: it reads vectors of a feature cache"):
            load()
