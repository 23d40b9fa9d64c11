"""Offline evaluation: a checkpoint and a manifest in; scores, captions, reports and findings out.

Rooms, lowest first (imports go down this list only):

- `metrics`: scores from arrays, without models and without Ray.
- `protocols`: one file a protocol; runs a model over a manifest with Ray Data. A new protocol is a new file here.
- `report`: results as one HTML file.
- `doctor`: checks of a training run's records, weights and model.
"""
