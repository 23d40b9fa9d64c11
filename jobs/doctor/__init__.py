"""A run folder in, findings about its model, log and rows out (`qformer doctor`)."""
