"""Decoding of videos and their sound, in child processes with a deadline."""
