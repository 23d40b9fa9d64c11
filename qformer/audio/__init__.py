"""Frozen audio encoders: segments of sound to one vector each."""

from qformer.audio.encoder import AudioEncoder
from qformer.audio.loading import load_audio

__all__ = ["AudioEncoder", "load_audio"]
