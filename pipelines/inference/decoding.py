"""Decoding for a trained bridge, as its training decoded: the offline jobs and serving take it from here."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.clip import Clip
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings, Limits
from pipelines.inference.models import Waveforms
from qformer.conversion.checkpoint import BridgeInfo
from qformer.errors import UserError


def decoding_of(
    info: BridgeInfo,
    limits: Limits,
    *,
    num_frames: int | None = None,
    sampling: Sampling | None = None,
    segments: Mapping[str, Any] | None = None,
) -> DecodeSettings:
    """How files become what the bridge was trained on: frames, and sound where it has a branch for it.

    Args:
        info: Record of the bridge.
        limits: What one file may cost.
        num_frames: Other than in training; None: as there.
        sampling: How frames are sampled, in place of the bridge's own; None: the bridge's own.
        segments: Fields of `AudioSampling` that are other than in training.

    Raises:
        UserError: If the bridge cannot read what would come of it.
    """
    audio = None
    try:
        if info.audio_sampling:
            audio = AudioSampling.from_dict({**info.audio_sampling, **(segments or {})})
    except ValueError as error:
        raise UserError(f"data.audio: {error}") from error
    frames = num_frames or info.num_frames
    is_joint = info.audio_branch is not None and info.audio_branch.is_joint
    if is_joint and audio is not None and audio.num_segments != frames:
        raise UserError(
            f"num_frames={frames} with {audio.num_segments} segments of sound: this bridge reads both together, one "
            f"segment a frame; leave num_frames and data.audio as in training ({info.num_frames})"
        )
    return DecodeSettings(
        preprocessing=info.preprocessing,
        num_frames=frames,
        sampling=sampling or Sampling.from_dict(info.sampling),
        limits=limits,
        audio=audio,
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
