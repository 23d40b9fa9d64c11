"""Toy inputs of the recipes with sound: clips with a tone, and an audio encoder with random weights."""

import json
import random
from pathlib import Path

import numpy as np
import torch

from jobs.demo.world.corpus import LICENCE
from jobs.demo.world.grammar import captions
from jobs.demo.world.render import SAMPLE_RATE_HZ, encode_mp4, render_clip_frames
from jobs.demo.world.scenes import sample_scene
from qformer.torch_build.torchvision import import_torchvision

NUM_CLIPS = 16
_SILENT_EVERY = 8
_MEL_BINS, _COLUMNS = 32, 256


def write_clips(folder: Path) -> None:
    """Write `manifest.jsonl` and clips, of which every eighth has no sound."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("toy clips")
    rows = []
    for index in range(NUM_CLIPS):
        scene, name = sample_scene(rng, "clip", held_out=False), f"clip-{index:02d}.mp4"
        frames, rate_hz = render_clip_frames(scene, rng)
        times_s = np.arange(round(len(frames) / rate_hz * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 800) * times_s)
        waveform = None if index % _SILENT_EVERY == 0 else tone.astype(np.float32)
        encode_mp4(frames, rate_hz, folder / name, waveform=waveform)
        texts = captions(scene, rng, 1)
        rows.append({"sample_id": name, "media": name, "kind": "video", "captions": texts, "licence": LICENCE})
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(content, encoding="utf-8")


def write_audio_encoder(folder: Path) -> None:
    """Write an AST with random weights."""
    import_torchvision()
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_length=_COLUMNS,
        num_mel_bins=_MEL_BINS,
    )
    ASTModel(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=_COLUMNS, num_mel_bins=_MEL_BINS).save_pretrained(folder)
