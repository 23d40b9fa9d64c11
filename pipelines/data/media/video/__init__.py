"""A video file in, sampled frames and sound out, in child processes with a deadline and a memory limit.

`pool` runs the children and sends them requests (`wire`); `child` is their program. There, `probe` reads the frame
times, `frames` picks and decodes frames by one of the `backends`, `audio_segments` and `waveform` decode the sound.
A new decoding library is one class in `backends` and its name in `media.clip.BACKEND_NAMES`.
"""
