"""Bytes in, `Clip`s of pixels and sound out.

`samples.SampleDecoder` is the entry for training, evaluation and serving: images are decoded in this process, videos in
child processes (`video/`). Every failure is a `MediaError`. Change frame selection in `frame_sampling`, sound segments
in `audio_sampling`, resize, crop and augmentation in `transforms`, image formats in `images`, file types in `kinds`.
"""
