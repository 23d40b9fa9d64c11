"""`qformer demo`: runs all jobs on a synthetic corpus whose captions can be checked automatically.

`run.py` is the sequence of jobs, `steps.py` reuses finished ones, `results.py` and `scoring.py` measure. `world` makes
the corpus, `backbones` the small frozen models in `models`, `video` is the second part with clips and sound.
"""
