"""Frozen audio encoders: segments of sound in, one vector each out.

`loading` loads any Hugging Face audio encoder; `encoder` runs it. A model with another token layout needs a case in
`encoder.layout_of`.
"""

from qformer.audio.encoder import AudioEncoder
from qformer.audio.loading import load_audio

__all__ = ["AudioEncoder", "load_audio"]
