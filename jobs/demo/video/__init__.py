"""The video part of the demo: clips whose captions need the order of their frames, and sound.

`bridges.py` lists the compared bridges, `answers.py` runs them, `scoring.py` and `results.py` measure. `world` makes
the clips, `backbones` the audio encoder and language model.
"""
