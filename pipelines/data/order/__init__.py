"""Manifest, mixture, seed and step in, row numbers out: which row is trained when."""
