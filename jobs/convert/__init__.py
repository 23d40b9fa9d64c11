"""Checkpoints of other projects in, ours out (`qformer import`), and the reverse (`qformer export`).

The conversions are in `qformer.conversion`; this room has the jobs around them.
"""
