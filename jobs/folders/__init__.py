"""Folders that jobs write into and read from: outputs, run folders, checkpoints."""
