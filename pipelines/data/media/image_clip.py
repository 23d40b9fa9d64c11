"""Image bytes to a clip of one frame, in this process or in a child."""

import numpy as np

from pipelines.data.media.clip import Clip, ClipRequest
from pipelines.data.media.images import decode_image, image_facts
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.media.transforms import draw_augmentation, resize_and_crop

_DRAFT_FACTOR = 2
"""JPEGs are decoded to at least this many times the target size; the resize filter hides the difference."""


def decode_image_clip(data: bytes, request: ClipRequest, costs: StageCosts) -> Clip:
    """Decode an image to a clip of one frame.

    Args:
        data: The file's content.
        request: Decode settings; its frame and time settings have no effect.
        costs: Costs to which this image's are added.

    Raises:
        MediaError: "corrupt", "unsupported" or "too_large".
    """
    preprocessing, augmentation, seed = request.preprocessing, request.augmentation, request.seed
    facts = image_facts(data, request.max_pixels) if request.wants_facts else None
    is_plain = seed is None or not augmentation.random_resized_crop
    # A random crop enlarges a part of the image, so it needs the full resolution.
    target = max(preprocessing.resize_short_side, preprocessing.height, preprocessing.width)
    with costs.measure("decode"):
        image = decode_image(data, request.max_pixels, _DRAFT_FACTOR * target if is_plain else None)
    box, is_flipped = None, False
    if seed is not None:
        box, is_flipped = draw_augmentation(image.width, image.height, augmentation, seed)
    with costs.measure("transform"):
        pixels = resize_and_crop(image, preprocessing, box, is_flipped)[None]
    return Clip(pixels, np.ones(1, dtype=np.bool_), facts)
