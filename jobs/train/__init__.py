"""Settings of a run in, a run folder with checkpoints and records out (`qformer train`)."""
