"""Decoding for a trained bridge, as its training decoded: the offline jobs and serving take it from here."""

from collections.abc import Sequence

import torch

from pipelines.data.audio_sampling import AudioSampling
from pipelines.data.batch import SampleBatch
from pipelines.data.clip import Clip
from pipelines.data.samples import DecodeSettings, Limits
from pipelines.data.sampling import Sampling
from qformer.bridge import Waveforms
from qformer.conversion.checkpoint import BridgeInfo


def decoding_of(info: BridgeInfo, limits: Limits) -> DecodeSettings:
    """How files become what the bridge was trained on: frames, and sound where it has a branch for it.

    Args:
        info: Of the bridge.
        limits: What one file may cost.
    """
    return DecodeSettings(
        preprocessing=info.preprocessing,
        num_frames=info.num_frames,
        sampling=Sampling.from_dict(info.sampling),
        limits=limits,
        audio=AudioSampling.from_dict(info.audio_sampling) if info.audio_sampling else None,
    )


def waveforms_of(batch: SampleBatch, rows: Sequence[int] | None = None) -> Waveforms | None:
    """Sound of a decoded batch's rows, for the bridge; None where none was asked for.

    Args:
        batch: Decoded.
        rows: Which; None: all valid ones.
    """
    if batch.audio is None or batch.audio_valid is None:
        return None
    chosen = batch.is_valid if rows is None else list(rows)
    return Waveforms(torch.from_numpy(batch.audio[chosen]), torch.from_numpy(batch.audio_valid[chosen]))


def waveforms_of_clip(clip: Clip) -> Waveforms | None:
    """Sound of one clip, as a batch of one."""
    if clip.waveforms is None or clip.audio_valid is None:
        return None
    return Waveforms(torch.from_numpy(clip.waveforms)[None], torch.from_numpy(clip.audio_valid)[None])
