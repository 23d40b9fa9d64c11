"""Decoding for a trained bridge, as its training decoded: the offline jobs and serving take it from here."""

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


def waveforms_of(batch: SampleBatch) -> Waveforms | None:
    """Sound of a decoded batch's valid rows, for the bridge; None where none was asked for."""
    if batch.audio is None or batch.audio_valid is None:
        return None
    return Waveforms(torch.from_numpy(batch.audio[batch.is_valid]), torch.from_numpy(batch.audio_valid[batch.is_valid]))


def waveforms_of_clip(clip: Clip) -> Waveforms | None:
    """Sound of one clip, as a batch of one."""
    if clip.waveforms is None or clip.audio_valid is None:
        return None
    return Waveforms(torch.from_numpy(clip.waveforms)[None], torch.from_numpy(clip.audio_valid)[None])
