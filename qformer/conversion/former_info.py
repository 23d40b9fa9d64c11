"""How files of format version 1 spelled backbones and bridges. Free of torch."""

from collections.abc import Mapping
from typing import Any

_PARTS = {
    "vision_pretrained": ("vision", "pretrained"),
    "vision_layer": ("vision", "layer"),
    "vision_image_size": ("vision", "image_size"),
    "audio_pretrained": ("audio", "pretrained"),
}
"""Former field -> the backbone it belongs to, and its name there."""
_FIELDS_OF_KIND = {
    "concatenate": (),
    "mean": (),
    "cascaded": ("max_frames", "num_queries", "num_layers", "freeze_frames"),
    "spatio_temporal": (
        "max_frames",
        "freeze_attention",
        "num_spatial_queries",
        "num_temporal_queries",
        "num_summary_queries",
    ),
}
"""Fields of `video` that each kind of bridge read; the others were written, and had no effect."""


def nested_specs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values of version 1 the form of version 2: one mapping for each backbone in place of loose fields.

    Args:
        values: Fields of version 1, those of `BridgeInfo` or of a service's encoder.

    Returns:
        The same with "vision", "audio" and "language" as mappings, or None where there is no such model.
    """
    found = {name: value for name, value in values.items() if name not in _PARTS}
    for name in ("vision", "audio", "language"):
        if name in values:
            found[name] = None if values[name] is None else {"name": values[name]}
    for old, (name, part) in _PARTS.items():
        if old in values and found.get(name) is not None:
            found[name][part] = values[old]
    return found


def bridge_values(video: Mapping[str, Any]) -> dict[str, Any]:
    """Kind and sizes of the bridge that the former field `video` describes.

    Args:
        video: "temporal", the former name of the kind, and sizes; empty in the earliest files.

    Raises:
        KeyError: If there is no such kind.
    """
    kind = video.get("temporal", "concatenate")
    return {"kind": kind} | {name: video[name] for name in _FIELDS_OF_KIND[kind] if name in video}
