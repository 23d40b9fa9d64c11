"""Checkpoints in, a running service or a config for `serve deploy` out (`qformer serve`)."""
