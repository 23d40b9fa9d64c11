"""A frozen audio encoder: segments of sound in, one vector each out.

Dimensions: B batch, A segments, N samples of a segment, G segments of several samples, P tokens, V encoder width.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qformer.backbones import require_finite
from qformer.errors import UserError

_SEGMENTS_PER_PASS = 32
"""Number of segments in a forward pass; bounds memory, because Whisper makes 1500 tokens of every segment."""
_WINDOW_S = 0.025
"""Window of every encoder's first layer; a shorter segment gives no features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The tokens of an encoder that belong to the sound; the others come from padding."""

    tokens_of: Callable[[int], list[int] | slice]
    """Function from the number of samples of a segment to its tokens."""
    max_samples: int | None = None
    """Longest segment that the encoder takes as a whole; None: any."""


class AudioEncoder(nn.Module):
    """A Hugging Face audio encoder behind its own feature extractor.

    Always in eval mode and without gradients, whatever the surrounding module is switched to.

    Args:
        model: Model with a last hidden state [G, P, V].
        extractor: Feature extractor of the model, which runs on the CPU.
        layout: Token layout of the model.
    """

    def __init__(self, model: nn.Module, extractor: Any, layout: TokenLayout) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.sample_rate_hz: int = extractor.sampling_rate
        self._extractor, self._layout = extractor, layout
        length = min(self.sample_rate_hz, layout.max_samples or self.sample_rate_hz)
        self.width: int = self(torch.zeros(1, length)).shape[1]

    def train(self, mode: bool = True) -> "AudioEncoder":
        """Stay in eval mode: a frozen encoder must not drop anything or update statistics."""
        return super().train(False)

    @property
    def extractor_fingerprint(self) -> str:
        """SHA-256 of the feature extractor's settings; together with the weights it decides the vectors."""
        return hashlib.sha256(self._extractor.to_json_string().encode()).hexdigest()

    def require_fit(self, segment_samples: int) -> None:
        """Check that the encoder can take segments of this length.

        Raises:
            UserError: If they are too long or too short for it.
        """
        rate = self.sample_rate_hz
        length_s = segment_samples / rate
        most = self._layout.max_samples
        if most is not None and segment_samples > most:
            raise UserError(
                f"data.audio.segment_s={length_s:g} is longer than the {most / rate:g} s that model.audio takes at a "
                "time; use more and shorter segments"
            )
        if length_s < _WINDOW_S:
            raise UserError(f"data.audio.segment_s={length_s:g} is shorter than model.audio's window of {_WINDOW_S} s")

    @torch.no_grad()
    def forward(self, waveforms_GN: Tensor) -> Tensor:
        """Encode segments.

        Args:
            waveforms_GN: float32 mono within [-1, 1] at `sample_rate_hz`, on any device.

        Returns:
            vectors_GV, in the encoder's dtype: each the mean over the tokens of the segment.
        """
        weight = next(self.model.parameters())
        given: Mapping[str, Tensor] = self._extractor(
            list(waveforms_GN.float().cpu().numpy()), sampling_rate=self.sample_rate_hz, return_tensors="pt"
        )
        inputs = {
            name: tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else None)
            for name, tensor in given.items()
        }
        tokens_GPV: Tensor = self.model(**inputs).last_hidden_state
        if tokens_GPV.dim() != 3:
            raise ValueError(f"its output is {tuple(tokens_GPV.shape)}, not [segments, tokens, width]")
        return tokens_GPV[:, self._layout.tokens_of(waveforms_GN.shape[1])].mean(dim=1)

    @torch.no_grad()
    def features(self, waveforms_BAN: Tensor, is_audio_BA: Tensor, sample_ids: Sequence[str] = ()) -> Tensor:
        """Encode the segments with sound.

        Args:
            waveforms_BAN: float32 mono within [-1, 1] at `sample_rate_hz`, on any device.
            is_audio_BA: False where there is no sound.
            sample_ids: Names for messages; without them, rows are numbered.

        Returns:
            audio_BAV, float32 on the encoder's device, zero where there is no sound.

        Raises:
            NotFiniteError: If a vector holds NaN or infinity.
        """
        device = next(self.model.parameters()).device
        audio_BAV = torch.zeros(*is_audio_BA.shape, self.width, device=device)
        segments = waveforms_BAN[is_audio_BA.to(waveforms_BAN.device)]
        if len(segments):
            parts = [cast(Tensor, self(part)).float() for part in segments.split(_SEGMENTS_PER_PASS)]
            audio_BAV[is_audio_BA.to(device)] = torch.cat(parts)
        require_finite(audio_BAV, torch.ones(len(audio_BAV), dtype=torch.bool, device=device), sample_ids)
        return audio_BAV


def layout_of(config: Any, extractor: Any) -> TokenLayout:
    """Token layout of a model, which may pad every segment to one length.

    Args:
        config: Config of the model.
        extractor: Feature extractor of the model.
    """
    match config.model_type:
        case "whisper":
            samples_per_token = extractor.n_samples / config.max_source_positions
            return TokenLayout(
                tokens_of=lambda length: slice(0, math.ceil(length / samples_per_token)),
                max_samples=extractor.n_samples,
            )
        case "audio-spectrogram-transformer":
            return _spectrogram_layout(config, extractor)
        case _:
            return TokenLayout(tokens_of=lambda length: slice(None))


def _spectrogram_layout(config: Any, extractor: Any) -> TokenLayout:
    """AST: patches of a spectrogram with 100 columns a second, row by row after two tokens for the whole."""
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    columns = (config.max_length - config.patch_size) // config.time_stride + 1
    step = extractor.sampling_rate // 100
    window = round(_WINDOW_S * extractor.sampling_rate)

    def tokens_of(length: int) -> list[int]:
        frames = max(0, length - window) // step + 1
        num_filled = min(columns, math.ceil(frames / config.time_stride))
        return [2 + row * columns + column for row in range(rows) for column in range(num_filled)]

    return TokenLayout(tokens_of=tokens_of, max_samples=(config.max_length - 1) * step + window)
