"""The actors that decode shards, run the frozen encoders and write the feature cache, without Ray themselves."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.data import schema
from pipelines.data.batches.batch import SampleBatch, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.token_codec import TokenDtype, encode_tokens
from pipelines.data.corpus.quarantine import require_readable
from pipelines.data.features.files import STATE
from pipelines.data.features.shards import file_states, write_shard
from pipelines.data.features.spec import FeatureSpec
from pipelines.data.media.audio_sampling import AudioSegments
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.media.stage_costs import StageCosts, cost_columns
from qformer.audio import AudioEncoder, load_audio
from qformer.backbones import VisionEncoder, load_vision, weights_fingerprint
from qformer.config import AudioSpec, VisionSpec
from qformer.errors import UserError

_DONE_AT_S = "done_at_s"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderChoice:
    """The frozen encoders, their settings, and the storage type of their outputs."""

    vision: VisionSpec
    precision: Literal["fp32", "bf16"]
    num_frames: int
    dtype: TokenDtype
    sampling: Sampling = Sampling()
    audio: AudioSpec | None = None
    """Audio encoder for the sound of videos; None: no sound."""
    segments: AudioSegments = AudioSegments()
    """Segments of sound."""

    def load(self) -> tuple[VisionEncoder, FeatureSpec]:
        """Load the encoders; return the vision encoder and the spec of the features.

        Raises:
            UserError: If an encoder cannot be loaded; see `load_vision` and `load_audio`.
        """
        return self.load_all()[::2]

    def load_all(self) -> tuple[VisionEncoder, AudioEncoder | None, FeatureSpec]:
        """Load both encoders and the spec of their features; see `load`."""
        weights_dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        encoder = load_vision(self.vision, dtype=weights_dtype)
        spec = FeatureSpec(
            vision=self.vision.name,
            weights=weights_fingerprint(encoder),
            layer=self.vision.layer,
            precision=self.precision,
            preprocessing=encoder.preprocessing,
            num_frames=self.num_frames,
            sampling=self.sampling,
            num_tokens=encoder.num_tokens,
            width=encoder.width,
            dtype=self.dtype,
        )
        if self.audio is None:
            return encoder, None, spec
        audio_encoder = load_audio(self.audio, dtype=weights_dtype)
        sampling = self.segments.at(audio_encoder.sample_rate_hz)
        audio_encoder.require_fit(sampling.segment_samples)
        spec_with_audio = dataclasses.replace(
            spec,
            audio=sampling,
            audio_encoder=self.audio.name,
            audio_weights=weights_fingerprint(audio_encoder),
            audio_extractor=audio_encoder.extractor_fingerprint,
            audio_width=audio_encoder.width,
        )
        return encoder, audio_encoder, spec_with_audio


class DecodeShards:
    """`DecodeRows` for shards: records the state of each file before it is read, and the time when a block is done.

    Args:
        decode: Decode settings.
    """

    def __init__(self, decode: DecodeSettings) -> None:
        self._decode = DecodeRows(decode)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Decode a block."""
        states = pa.array(file_states(rows[schema.MEDIA].to_pylist()), pa.string())
        decoded = self._decode(rows).append_column(STATE, states)
        return decoded.append_column(_DONE_AT_S, pa.array([time.time()] * len(decoded), pa.float64()))

    def close(self) -> None:
        """End the video children."""
        self._decode.close()


def queued_seconds(block: pa.Table) -> float:
    """Time that a block of `DecodeShards` has waited; clocks of two machines may differ."""
    return max(0.0, time.time() - float(block[_DONE_AT_S][0].as_py()))


class EncodeShards:
    """Encodes one decoded block and writes it as one shard.

    Args:
        choice: Frozen encoders.
        folder: Folder of the cache.
        frames_per_pass: Number of frames in one pass of the vision encoder; bounds its memory.
        device: "cpu" or "cuda".
    """

    def __init__(self, choice: EncoderChoice, folder: str, frames_per_pass: int, device: str) -> None:
        encoder, audio_encoder, self._spec = choice.load_all()
        self._encoder, self._audio_encoder = encoder.to(device), audio_encoder and audio_encoder.to(device)
        self._folder, self._frames_per_pass, self._device = folder, frames_per_pass, device
        self._idle_since_s = time.perf_counter()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encode and write a shard from `DecodeShards`.

        Returns:
            One row about it: rows, failed, bytes; wait_s, the time this actor waited for it; queued_s, the time it
            waited for an actor (their sum divided by the wall time is the mean queue length); and the costs of all
            stages.
        """
        wait_s, queued_s = time.perf_counter() - self._idle_since_s, queued_seconds(block)
        batch, states = unpack(block), block[STATE].to_pylist()
        require_readable(batch.failures)
        try:
            with batch.costs.measure("encode"):
                tokens, vectors = self.tokens(batch), self.vectors(batch)
            with batch.costs.measure("write"):
                size_bytes = write_shard(self._folder, batch, tokens, self._spec.dtype, states, vectors)
        except ValueError as error:
            raise UserError(f"shard {batch.step} (sample {batch.sample_ids[0]!r} and on): {error}") from error
        counts = {"rows": len(batch.sample_ids), "failed": len(batch.failures), "bytes": size_bytes}
        values = {**counts, "wait_s": wait_s, "queued_s": queued_s}
        self._idle_since_s = time.perf_counter()
        return pa.table({**{name: [value] for name, value in values.items()}, **cost_columns([batch.costs])})

    @torch.inference_mode()
    def tokens(self, batch: SampleBatch) -> list[NDArray[np.float32] | None]:
        """Encode a batch: tokens [T, P, V] of each row, None where it failed."""
        tokens: list[NDArray[np.float32] | None] = [None] * len(batch.sample_ids)
        valid = np.flatnonzero(batch.is_valid)
        samples_per_pass = max(1, self._frames_per_pass // batch.images.shape[1])
        for start in range(0, len(valid), samples_per_pass):
            rows = valid[start : start + samples_per_pass]
            pixels = torch.from_numpy(batch.images[rows]).to(self._device)
            for row, sample in zip(rows, self._encoder(pixels).float().cpu().numpy(), strict=True):
                tokens[row] = sample
        return tokens

    @torch.inference_mode()
    def vectors(self, batch: SampleBatch) -> list[NDArray[np.float32]] | None:
        """Encode the batch's sound: vectors [valid, V] of each row's valid segments; None without audio encoder."""
        if self._audio_encoder is None or batch.audio is None or batch.audio_valid is None:
            return None
        found = []
        for waveforms, is_valid in zip(batch.audio, batch.audio_valid, strict=True):
            waveforms_BAN = torch.from_numpy(waveforms[is_valid])[None]
            is_audio_BA = torch.ones(waveforms_BAN.shape[:2], dtype=torch.bool)
            found.append(self._audio_encoder.features(waveforms_BAN, is_audio_BA)[0].cpu().numpy())
        return found


def measure_rows(
    choice: EncoderChoice, decode: DecodeSettings, frames_per_pass: int, device: str, blocks: Sequence[pa.Table]
) -> list[StageCosts]:
    """Decode and encode blocks once, writing nothing, to measure the costs.

    Args:
        choice: Frozen encoders.
        decode: Decode settings.
        frames_per_pass: Number of frames in one pass of the vision encoder.
        device: "cpu" or "cuda".
        blocks: Blocks of `plan.evaluation_blocks`; the first row of each is run twice, to warm up.

    Returns:
        Costs of each block.
    """
    decode_rows, encoder = DecodeRows(decode), EncodeShards(choice, "", frames_per_pass, device)
    costs = []
    for block in blocks:
        encoder.tokens(unpack(decode_rows(block.slice(0, 1))))
        batch = unpack(decode_rows(block))
        with batch.costs.measure("encode"):
            tokens, vectors = encoder.tokens(batch), encoder.vectors(batch)
        with batch.costs.measure("write"):
            for values in [*tokens, *(vectors or [])]:
                if values is not None:
                    encode_tokens(values, choice.dtype)
        costs.append(batch.costs)
    decode_rows.close()
    return costs
