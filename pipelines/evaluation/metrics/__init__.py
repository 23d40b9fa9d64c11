"""Predictions and references in, scores out; free of models and of Ray. One file for each family of metrics."""
