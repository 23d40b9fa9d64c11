"""The feature cache: a manifest in, the frozen encoders' outputs out, written once and read in training.

`files` documents the layout, `spec` what decides a cache's content, `shard_encoder` and `shards` write it, `cache`
reads it in place of pixels, `forecast` estimates size and time before, `cleaning` finds caches that no run uses.
A setting that changes features must become a field of `spec.FeatureSpec`.
"""
