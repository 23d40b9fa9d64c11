"""The actor that runs the frozen encoders over decoded blocks and writes the feature cache; itself free of Ray."""

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
from pipelines.data.media.audio_sampling import AudioSampling
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
    """Which frozen encoders, how they are run, and how what they make is stored."""

    vision: VisionSpec
    precision: Literal["fp32", "bf16"]
    num_frames: int
    dtype: TokenDtype
    sampling: Sampling = Sampling()
    audio: AudioSpec | None = None
    """Encoder of the videos' sound; None: their sound is left out."""
    num_segments: int = 8
    segment_s: float = 2.0
    """Of sound: see `AudioSampling`."""

    def load(self) -> tuple[VisionEncoder, FeatureSpec]:
        """Load the encoders; return the one that sees, and a description of the features.

        Raises:
            UserError: As `load_vision` and `load_audio`.
        """
        return self.load_all()[::2]

    def load_all(self) -> tuple[VisionEncoder, AudioEncoder | None, FeatureSpec]:
        """Load the encoders and describe the features they make; see `load`."""
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
        ears = load_audio(self.audio, dtype=weights_dtype)
        sampling = AudioSampling(
            sample_rate_hz=ears.sample_rate_hz, num_segments=self.num_segments, segment_s=self.segment_s
        )
        ears.require_fit(sampling.segment_samples)
        heard = dataclasses.replace(
            spec,
            audio=sampling,
            audio_encoder=self.audio.name,
            audio_weights=weights_fingerprint(ears),
            audio_extractor=ears.extractor_fingerprint,
            audio_width=ears.width,
        )
        return encoder, ears, heard


class DecodeShards:
    """`DecodeRows` for shards: notes how each file was before it was read, and when the block was done.

    Args:
        decode: How files become pixels.
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
    """How long a block of `DecodeShards` has waited; clocks of two machines may differ."""
    return max(0.0, time.time() - float(block[_DONE_AT_S][0].as_py()))


class EncodeShards:
    """Encodes one decoded block and writes it as one shard.

    Args:
        choice: The encoders.
        folder: Of the cache.
        frames_per_pass: Frames that go through the vision encoder at a time; bounds its memory.
        device: "cpu" or "cuda".
    """

    def __init__(self, choice: EncoderChoice, folder: str, frames_per_pass: int, device: str) -> None:
        encoder, ears, self._spec = choice.load_all()
        self._encoder, self._ears = encoder.to(device), ears and ears.to(device)
        self._folder, self._frames_per_pass, self._device = folder, frames_per_pass, device
        self._idle_since_s = time.perf_counter()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write a shard, out of `DecodeShards`.

        Returns:
            One row about it: rows, failed, bytes; wait_s that this actor waited for it; queued_s that it waited for
            an actor (of all blocks together divided by the time they took: the mean length of the queue); and the
            costs of all stages.
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
        """Encode a batch: [T, P, V] of each row, None where it failed."""
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
        """Encode the batch's sound: [valid, V] of each row's valid segments; None without audio encoder."""
        if self._ears is None or batch.audio is None or batch.audio_valid is None:
            return None
        found = []
        for waveforms, is_valid in zip(batch.audio, batch.audio_valid, strict=True):
            heard_BAN = torch.from_numpy(waveforms[is_valid])[None]
            is_audio_BA = torch.ones(heard_BAN.shape[:2], dtype=torch.bool)
            found.append(self._ears.features(heard_BAN, is_audio_BA)[0].cpu().numpy())
        return found


def measure_rows(
    choice: EncoderChoice, decode: DecodeSettings, frames_per_pass: int, device: str, blocks: Sequence[pa.Table]
) -> list[StageCosts]:
    """Decode and encode blocks once, writing nothing, to learn what the others will cost.

    Args:
        choice: The encoder.
        decode: How files become pixels.
        frames_per_pass: See `EncodeShards`.
        device: "cpu" or "cuda".
        blocks: Rows as `plan.evaluation_blocks` gives them; the first of each is done twice, to warm up.

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
