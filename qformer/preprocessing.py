"""The preprocessing contract: how decoded pixels become the frozen encoder's input."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qformer.errors import UserError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash"]
PIL_INTERPOLATIONS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Size, crop, interpolation and normalisation, taken from the encoder's own data config.

    One object serves training, feature caching, evaluation and serving; it is saved with every checkpoint and export.
    The geometry (resize, crop) runs on uint8 RGB images in `pipelines.data.media.transforms`, the normalisation on the
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
        fields = dict(values)
        fields["mean"], fields["std"] = tuple(fields["mean"]), tuple(fields["std"])
        return cls(**fields)


def transformers_preprocessing(values: dict[str, Any], image_size: int | None = None) -> Preprocessing:
    """Translate a Hugging Face image processor's preprocessor_config.json into the contract.

    Raises:
        UserError: If the file lacks what the contract needs.
    """
    size, crop = values.get("size"), values.get("crop_size") if values.get("do_center_crop") else None
    if isinstance(size, int):
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if not size or "image_mean" not in values or "image_std" not in values:
        raise UserError(
            f"model.vision: preprocessor_config.json needs size, image_mean and image_std, has {sorted(values)}"
        )
    target = crop or size
    height, width = (target.get(side) or target["shortest_edge"] for side in ("height", "width"))
    short_side = size.get("shortest_edge") or min(size["height"], size["width"])
    if image_size is not None:
        short_side, height, width = (
            max(round(short_side * image_size / min(height, width)), image_size),
            image_size,
            image_size,
        )
    return Preprocessing(
        height=height,
        width=width,
        resize_short_side=short_side,
        interpolation=PIL_INTERPOLATIONS[values.get("resample", 2)],
        crop="center" if crop or "shortest_edge" in size else "squash",
        mean=tuple(values["image_mean"]),
        std=tuple(values["image_std"]),
    )


def timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Translate timm's data configuration into the contract."""
    _, height, width = config["input_size"]
    return Preprocessing(
        height=height,
        width=width,
        resize_short_side=max(int(min(height, width) / config.get("crop_pct", 1.0)), height, width),
        interpolation=config.get("interpolation", "bicubic"),
        crop="squash" if config.get("crop_mode") == "squash" else "center",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
