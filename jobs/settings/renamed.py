"""Former keys of settings, and their present names."""

import copy
from typing import Any

from qformer.conversion.former_info import bridge_values

RENAMED = {
    "model.vision_pretrained": "model.vision.pretrained",
    "model.vision_layer": "model.vision.layer",
    "model.vision_image_size": "model.vision.image_size",
    "model.audio_pretrained": "model.audio.pretrained",
    "model.temporal": "model.bridge.kind",
    "model.video": "model.bridge",
    "vision_pretrained": "vision.pretrained",
    "vision_layer": "vision.layer",
    "vision_image_size": "vision.image_size",
    "audio_pretrained": "audio.pretrained",
}
"""Former dotted key -> present one, of all jobs together."""


def with_present_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Move the values of former keys to the present ones, for files that an earlier version wrote.

    A value whose new place is below null is dropped: there is no such model.

    Args:
        values: Mapping as a YAML file holds it, every frozen model in its long form.
    """
    values = copy.deepcopy(values)
    model = values.get("model")
    if isinstance(model, dict) and "bridge" not in model:
        # `video` held the sizes of every kind: those of other kinds had no effect.
        video = {"temporal": model.pop("temporal", "concatenate"), **model.pop("video", {})}
        model["bridge"] = bridge_values(video)
    for old, new in RENAMED.items():
        holder, name = _holder(values, old)
        if holder is None or name not in holder:
            continue
        value = holder.pop(name)
        target, part = _holder(values, new)
        if target is not None:
            target[part] = value
    return values


def _holder(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a key, None where there is none, and the key's last part."""
    *parents, name = dotted.split(".")
    holder: Any = values
    for parent in parents:
        holder = holder.get(parent) if isinstance(holder, dict) else None
    return (holder if isinstance(holder, dict) else None), name
