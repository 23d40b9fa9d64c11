"""How bridge.json of format version 1 spelled its backbones. Free of torch."""

from collections.abc import Mapping
from typing import Any

_PARTS = {
    "vision_pretrained": ("vision", "pretrained"),
    "vision_layer": ("vision", "layer"),
    "vision_image_size": ("vision", "image_size"),
    "audio_pretrained": ("audio", "pretrained"),
}
"""Former field -> the backbone it belongs to, and its name there."""


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
