"""Checkpoints of other projects into ours (`qformer import`), and ours into theirs (`qformer export`)."""
