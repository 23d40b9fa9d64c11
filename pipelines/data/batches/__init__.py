"""Decoded clips in, Arrow tables and `SampleBatch` out."""
