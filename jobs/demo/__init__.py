"""The demo: a small world whose captions can be checked, and its tiny frozen models."""
