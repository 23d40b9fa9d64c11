"""Small real media made on the spot."""

import io

import av
import numpy as np
from PIL import Image


def jpeg_bytes(seed: int = 0, size: tuple[int, int] = (200, 160)) -> bytes:
    """A JPEG of blocky noise, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def png_bytes(size: tuple[int, int]) -> bytes:
    """A plain PNG, small in bytes whatever its size."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(buffer, format="PNG")
    return buffer.getvalue()


def mp4_bytes(seed: int = 0, num_frames: int = 20) -> bytes:
    """An H.264 clip at 10 frames a second whose picture changes every five frames."""
    random = np.random.default_rng(seed)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(num_frames):
            if index % 5 == 0:
                blocks = random.integers(0, 255, (4, 6, 3), dtype=np.uint8)
            picture = np.kron(blocks, np.ones((16, 16, 1), dtype=np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
