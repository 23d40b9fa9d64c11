"""The preprocessing contract: how decoded pixels become the frozen encoder's input."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Size, crop, interpolation and normalisation, taken from the encoder's own data config.

    One object serves training, feature caching, evaluation and serving; it is saved with every checkpoint and export.
    The geometry (resize, crop) runs on uint8 RGB images in `pipelines.data.transforms`, the normalisation on the
    encoder's device in `qformer.backbones.VisionEncoder`.

    Raises:
        ValueError: If a size is not positive, the crop exceeds the resized image, or a channel list is not RGB.
    """

    height: int
    """Encoder input height in pixels."""
    width: int
    """Encoder input width in pixels."""
    resize_short_side: int
    """Short side in pixels after the resize and before the centre crop; unused when `crop` is "squash"."""
    interpolation: Interpolation
    crop: CropMode = "center"
    """"center": resize the short side, cut the centre. "squash": resize straight to height x width."""
    mean: tuple[float, float, float]
    """Per-channel RGB mean of pixels scaled to [0, 1]."""
    std: tuple[float, float, float]
    """Per-channel RGB standard deviation of pixels scaled to [0, 1]."""

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.resize_short_side) < 1:
            raise ValueError(f"preprocessing sizes must be positive, got {self}")
        if self.crop == "center" and self.resize_short_side < max(self.height, self.width):
            raise ValueError(
                f"resize_short_side={self.resize_short_side} is smaller than the crop "
                f"{self.height}x{self.width}; raise it or use crop='squash'"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three RGB values (std positive), got {self.mean} and {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Rebuild from `to_dict` output or its JSON.

        Raises:
            TypeError: If a key is unknown or missing.
        """
        kept = dict(values)
        kept["mean"], kept["std"] = tuple(kept["mean"]), tuple(kept["std"])
        return cls(**kept)
