"""A checkpoint and a manifest in, scores and captions out (`qformer evaluate`, `qformer caption`)."""
