"""Workarounds for faults of torch builds, one module each."""
