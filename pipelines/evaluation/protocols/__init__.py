"""A checkpoint and a manifest in, scored rows out, over Ray Data; one file a protocol."""
