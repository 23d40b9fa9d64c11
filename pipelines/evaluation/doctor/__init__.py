"""Records, weights and model of a training run in, findings out: one line each, with advice.

`log.py`, `run.py` and `weights.py` check what the run wrote; `pairs.py` and `probe.py` measure the model on true and
permuted pairs, and `model.py` judges those figures. `findings.py` is the form of a finding.
"""
