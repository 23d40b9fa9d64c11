"""One run on one rank: model, frozen encoders, checkpoints, resume."""
