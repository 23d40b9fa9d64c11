"""Readers of everything that rows come from; `source.read_source` is the entry."""
