"""The feature cache: what the frozen encoders made of a manifest, written once and read in training."""
