"""The frozen encoders of a run on one rank, or their outputs from a feature cache."""

from typing import cast

import torch
from torch import Tensor, nn

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.features.shard_encoder import EncoderChoice
from pipelines.data.features.spec import FeatureSpec
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.training.run.model_choice import ModelChoice
from qformer.audio import AudioEncoder, load_audio
from qformer.backbones import load_vision
from qformer.bridges.audio_branch import Sound
from qformer.config import AudioSpec
from qformer.distributed import rank


class FrozenEncoders:
    """The encoders of a batch's pictures and of its sound.

    Args:
        choice: Frozen models and bridge of the run.
        device: Device of the encoders.
        dtype: Number format of their weights.
        features: Spec of the feature cache that takes their place; None runs them.

    Raises:
        UserError: If one cannot be loaded, or the cache is of another.

    Attributes:
        modules: The loaded encoders by name.
        fingerprints: Digests of encoders that only a feature cache records.
        preprocessing: Input contract of the vision encoder.
        vision_width: Width of the vision encoder's tokens.
        audio_width: Width of the audio encoder's vectors; None without audio encoder.
        audio_sampling: Segments of sound; None without audio encoder.
    """

    def __init__(
        self, choice: ModelChoice, device: torch.device, dtype: torch.dtype, features: FeatureSpec | None
    ) -> None:
        self._device = device
        self.modules: dict[str, nn.Module] = {}
        self.fingerprints: dict[str, str] = {}
        self.audio_width: int | None = None
        self.audio_sampling: AudioSampling | None = None
        self._audio: AudioEncoder | None = None
        if features is not None:
            self._read_spec(choice, features)
            return
        if choice.audio is not None:
            self._audio = self._audio_encoder(choice, choice.audio, dtype)
        encoder = load_vision(choice.vision, dtype=dtype).to(device)
        self.modules["vision"] = encoder
        self.preprocessing, self.vision_width = encoder.preprocessing, encoder.width

    def encode(self, batch: SampleBatch) -> Tensor:
        """tokens_BFPV of a batch of pixels or of cached tokens; fp32 on the device."""
        images = torch.from_numpy(batch.images).to(self._device, non_blocking=True)
        encoder = self.modules.get("vision")
        return cast(Tensor, images if encoder is None else encoder(images)).float()

    def encode_audio(self, batch: SampleBatch) -> Sound | None:
        """Vectors of a batch's sound, encoded or cached; None without audio encoder."""
        if self.audio_width is None or batch.audio is None or batch.audio_valid is None:
            return None
        audio, is_segment_BA = torch.from_numpy(batch.audio), torch.from_numpy(batch.audio_valid)
        encoder = self._audio
        audio_BAV = audio.float() if encoder is None else encoder.features(audio, is_segment_BA, batch.sample_ids)
        return Sound(audio_BAV.to(self._device), is_segment_BA.to(self._device))

    def _audio_encoder(self, choice: ModelChoice, spec: AudioSpec, dtype: torch.dtype) -> AudioEncoder:
        encoder = load_audio(spec, dtype=dtype).to(self._device)
        sampling = choice.segments.at(encoder.sample_rate_hz)
        encoder.require_fit(sampling.segment_samples)
        self.modules["audio"], self.audio_width, self.audio_sampling = encoder, encoder.width, sampling
        return encoder

    def _read_spec(self, choice: ModelChoice, features: FeatureSpec) -> None:
        features = features if choice.audio else features.without_audio()
        _require_same(choice, features)
        self.fingerprints["vision"] = features.weights
        self.preprocessing, self.vision_width = features.preprocessing, features.width
        if features.audio is not None:
            self.fingerprints["audio"] = str(features.audio_weights)
            self.audio_width, self.audio_sampling = features.audio_width, features.audio


def _require_same(choice: ModelChoice, features: FeatureSpec) -> None:
    if rank() != 0:  # once is enough: the encoder may be large
        return
    is_cached = choice.audio is not None and choice.audio.is_cached
    encoder = EncoderChoice(
        vision=choice.vision,
        precision=features.precision,
        num_frames=choice.num_frames,
        sampling=choice.sampling,
        dtype=features.dtype,
        audio=None if is_cached else choice.audio,
        segments=choice.segments,
    )
    encoder.load()[1].require_same(features.without_audio() if is_cached else features)
