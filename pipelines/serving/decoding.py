"""Uploads to model input, beside the event loop."""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pipelines.data.media import MediaError
from pipelines.data.samples import DecodeSettings, SampleDecoder
from pipelines.serving.errors import ApiError
from pipelines.serving.uploads import Upload

# What the client is told about a file that cannot be used, by the error class of the data plane.
REFUSALS = {
    "corrupt": (400, "invalid_media"),
    "missing": (400, "invalid_media"),
    "config": (400, "invalid_media"),
    "unsupported": (415, "unsupported_media_type"),
    "too_large": (422, "media_too_large"),
    "timeout": (504, "timeout"),
    "transient": (503, "unavailable"),
}


class DecodePool:
    """Decodes a few uploads side by side.

    The decoder is that of training and of the caption job, so a served caption is the offline caption. Videos run
    in its killable children, one for each thread.
    """

    def __init__(self, settings: DecodeSettings, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._decoder = SampleDecoder(settings, num_video_children=num_threads)

    async def decode(self, upload: Upload) -> NDArray[np.uint8]:
        """Decode one upload.

        Returns:
            uint8 [T, 3, H, W] with T = 1 for an image.

        Raises:
            ApiError: When the file cannot be used, by `REFUSALS`.
        """
        task = functools.partial(self._decoder.decode, kind=upload.kind, data=upload.data)
        try:
            clip = await asyncio.get_running_loop().run_in_executor(self._threads, task)
            return clip.pixels
        except MediaError as error:
            status, kind = REFUSALS[error.error_class]
            raise ApiError(status, kind, f"the {upload.kind} cannot be used: {error.message}") from None
