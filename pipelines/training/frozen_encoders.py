"""The frozen encoders of a run on one rank: run on every batch, or what a feature cache kept of them."""

from typing import cast

import torch
from torch import Tensor, nn

from pipelines.data.batch import SampleBatch
from pipelines.data.encode_shards import EncoderChoice
from pipelines.data.feature_spec import FeatureSpec
from pipelines.data.sampling import Sampling
from pipelines.training.model_choice import ModelChoice
from qformer.audio import AudioEncoder, load_audio
from qformer.backbones import load_vision
from qformer.distributed import rank
from qformer.video.audio_branch import Sound


class FrozenEncoders:
    """What sees the pictures of a batch and hears its sound.

    Args:
        choice: Names them.
        device: Where they run.
        dtype: Of their weights.
        features: Spec of the feature cache that takes their place; None runs them.

    Raises:
        UserError: If one cannot be loaded, or the cache is of another.

    Attributes:
        modules: Those that are held, by name.
        fingerprints: Of those that only a cache tells of.
        preprocessing: What pictures are made into for them.
        vision_width: Of their tokens.
        audio_width: Of the vectors of sound; None where there is no audio encoder.
    """

    def __init__(
        self, choice: ModelChoice, device: torch.device, dtype: torch.dtype, features: FeatureSpec | None
    ) -> None:
        self._device = device
        self.modules: dict[str, nn.Module] = {}
        self.fingerprints: dict[str, str] = {}
        self._ears = self._audio_encoder(choice, dtype)
        self.audio_width = None if self._ears is None else self._ears.width
        if features is not None:
            _require_same(choice, features)
            self.fingerprints["vision"] = features.weights
            self.preprocessing, self.vision_width = features.preprocessing, features.width
            return
        encoder = load_vision(
            choice.vision,
            pretrained=choice.vision_pretrained,
            layer=choice.vision_layer,
            dtype=dtype,
            image_size=choice.vision_image_size,
        ).to(device)
        self.modules["vision"] = encoder
        self.preprocessing, self.vision_width = encoder.preprocessing, encoder.width

    def see(self, batch: SampleBatch) -> Tensor:
        """Tokens_BFPV of a batch of pixels, or of tokens that a cache kept; fp32 on the device."""
        images = torch.from_numpy(batch.images).to(self._device, non_blocking=True)
        encoder = self.modules.get("vision")
        return cast(Tensor, images if encoder is None else encoder(images)).float()

    def hear(self, batch: SampleBatch) -> Sound | None:
        """Vectors of a batch's sound, or those that a cache kept; None where none was asked for."""
        if self._ears is None or batch.audio is None or batch.audio_valid is None:
            return None
        audio, is_segment_BA = torch.from_numpy(batch.audio), torch.from_numpy(batch.audio_valid)
        audio_BAV = self._ears.features(audio, is_segment_BA) if "vision" in self.modules else audio.float()
        return Sound(audio_BAV.to(self._device), is_segment_BA.to(self._device))

    def _audio_encoder(self, choice: ModelChoice, dtype: torch.dtype) -> AudioEncoder | None:
        if choice.audio is None:
            return None
        ears = load_audio(choice.audio, pretrained=choice.audio_pretrained, dtype=dtype).to(self._device)
        self.modules["audio"] = ears
        return ears


def _require_same(choice: ModelChoice, features: FeatureSpec) -> None:
    if rank() != 0:  # once is enough: the encoder may be large
        return
    encoder = EncoderChoice(
        vision=choice.vision,
        pretrained=choice.vision_pretrained,
        layer=choice.vision_layer,
        precision=features.precision,
        num_frames=choice.num_frames,
        sampling=Sampling.from_dict(choice.sampling),
        dtype=features.dtype,
        image_size=choice.vision_image_size,
    )
    encoder.load()[1].require_same(features)
