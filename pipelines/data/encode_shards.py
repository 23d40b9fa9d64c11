"""The actor that runs the frozen encoder over decoded blocks and writes the feature cache; itself free of Ray."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.data.batch import SampleBatch, unpack
from pipelines.data.features import FeatureSpec, write_shard
from pipelines.data.quarantine import require_readable
from pipelines.data.token_codec import TokenDtype
from qformer.backbones import VisionEncoder, load_vision, weights_fingerprint
from qformer.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderChoice:
    """Which frozen encoder, how it is run, and how its tokens are stored."""

    vision: str
    pretrained: bool
    layer: int
    precision: Literal["fp32", "bf16"]
    num_frames: int
    dtype: TokenDtype
    image_size: int | None = None
    """Side of the encoder's input in pixels when not its own."""

    def load(self) -> tuple[VisionEncoder, FeatureSpec]:
        """Load the encoder and describe the features it makes.

        Raises:
            UserError: As `load_vision`.
        """
        weights_dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        encoder = load_vision(
            self.vision,
            pretrained=self.pretrained,
            layer=self.layer,
            dtype=weights_dtype,
            image_size=self.image_size,
        )
        spec = FeatureSpec(
            vision=self.vision,
            weights=weights_fingerprint(encoder),
            layer=self.layer,
            precision=self.precision,
            preprocessing=encoder.preprocessing,
            num_frames=self.num_frames,
            num_tokens=encoder.num_tokens,
            width=encoder.width,
            dtype=self.dtype,
        )
        return encoder, spec


class EncodeShards:
    """Encodes one decoded block and writes it as one shard.

    Args:
        choice: The encoder.
        folder: Of the cache.
        frames_per_pass: Frames that go through the encoder at a time; bounds its memory.
        device: "cpu" or "cuda".
    """

    def __init__(self, choice: EncoderChoice, folder: str, frames_per_pass: int, device: str) -> None:
        encoder, self._spec = choice.load()
        self._encoder = encoder.to(device)
        self._folder, self._frames_per_pass, self._device = folder, frames_per_pass, device

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write a shard; return one row about it: rows, failures, bytes."""
        batch = unpack(block)
        require_readable(batch.failures)
        try:
            size_bytes = write_shard(self._folder, batch, self._tokens(batch), self._spec.dtype)
        except ValueError as error:
            raise UserError(f"shard {batch.step} (sample {batch.sample_ids[0]!r} and on): {error}") from error
        return pa.table({"rows": [len(batch.sample_ids)], "bytes": [size_bytes]})

    @torch.inference_mode()
    def _tokens(self, batch: SampleBatch) -> list[NDArray[np.float32] | None]:
        tokens: list[NDArray[np.float32] | None] = [None] * len(batch.sample_ids)
        valid = np.flatnonzero(batch.is_valid)
        samples_per_pass = max(1, self._frames_per_pass // batch.images.shape[1])
        for start in range(0, len(valid), samples_per_pass):
            rows = valid[start : start + samples_per_pass]
            pixels = torch.from_numpy(batch.images[rows]).to(self._device)
            for row, sample in zip(rows, self._encoder(pixels).float().cpu().numpy(), strict=True):
                tokens[row] = sample
        return tokens
