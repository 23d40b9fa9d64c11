"""Spectrogram pictures of sound, for the report."""

import numpy as np
from numpy.typing import NDArray

_WINDOW = 512
_HOP = 160
_NUM_BANDS = 32
_LOWEST_BIN, _HIGHEST_BIN = 3, 128
"""Bins of the window's spectrum: about 100 Hz to 4 kHz at 16 kHz."""
_FLOOR_DB = -50.0


def spectrogram_picture(waveform: NDArray[np.float32], *, height: int) -> NDArray[np.uint8]:
    """Draw a spectrogram: time to the right, frequency upwards (logarithmic), loudness as brightness.

    Args:
        waveform: Mono samples.
        height: Height of the picture in pixels.

    Returns:
        RGB [height, width, 3], one column per 160 samples.
    """
    starts = range(0, len(waveform) - _WINDOW + 1, _HOP)
    pieces = np.stack([waveform[start : start + _WINDOW] for start in starts]) * np.hanning(_WINDOW)
    spectrum = np.abs(np.fft.rfft(pieces, axis=1)) / (_WINDOW / 4)
    edges = np.geomspace(_LOWEST_BIN, _HIGHEST_BIN, _NUM_BANDS + 1).round().astype(int)
    bands = [spectrum[:, low : max(high, low + 1)].max(1) for low, high in zip(edges, edges[1:], strict=False)]
    loudness_db = 20 * np.log10(np.maximum(np.stack(bands[::-1]), 1e-6))
    share = np.clip(1 - loudness_db / _FLOOR_DB, 0, 1)
    rows = np.arange(height) * _NUM_BANDS // height
    dark, bright = np.array([24, 20, 48]), np.array([255, 214, 90])
    return np.asarray(dark + share[rows][:, :, None] * (bright - dark), dtype=np.uint8)
