"""Sound of a clip: one tone with noise."""

import random

import numpy as np
from numpy.typing import NDArray

from jobs.demo.video.world.scenes import Tone
from jobs.demo.world.render import SAMPLE_RATE_HZ

HZ_OF_PITCH = {"low": (200.0, 270.0), "middle": (600.0, 800.0), "high": (1800.0, 2400.0)}
START_OF_SIDE = {"before": (0.05, 0.15), "after": (0.65, 0.75)}
"""Range of the start of a tone, in shares of the clip."""
LENGTH = (0.15, 0.2)
"""Range of the length of a tone, in shares of the clip; it ends before a following event and before the clip ends."""
_LOUDNESS = (0.2, 0.5)
_OVERTONE = 0.3
_NOISE_STD = (0.001, 0.01)
_FADE_S = 0.02


def waveform_of(tone: Tone, duration_s: float, rng: random.Random) -> NDArray[np.float32]:
    """Make a clip's sound.

    Args:
        tone: Pitch, and on which side of the clip's middle.
        duration_s: Length of the clip.
        rng: Random number generator.

    Returns:
        Mono samples at `SAMPLE_RATE_HZ` within [-1, 1], as long as the clip.
    """
    low_hz, high_hz = HZ_OF_PITCH[tone.pitch]
    pitch_hz = low_hz * (high_hz / low_hz) ** rng.random()
    start_s = duration_s * rng.uniform(*START_OF_SIDE[tone.side])
    length_s = duration_s * rng.uniform(*LENGTH)
    loudness = rng.uniform(*_LOUDNESS)
    times_s = np.arange(round(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ - start_s
    phase = 2 * np.pi * (pitch_hz * times_s + rng.random())
    wave = (np.sin(phase) + _OVERTONE * np.sin(2 * phase)) / (1 + _OVERTONE)
    # Without fades, both ends of the tone would click in all frequencies.
    envelope = np.clip(np.minimum(times_s, length_s - times_s) / _FADE_S, 0, 1)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, rng.uniform(*_NOISE_STD), len(times_s))
    return np.asarray((loudness * envelope * wave + noise).clip(-1, 1), dtype=np.float32)
