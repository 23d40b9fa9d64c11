"""A seed in, the demo's synthetic corpus out: pictures, clips, captions and the ground truth.

`scenes.py` draws the content, `render.py` the pixels, `grammar.py` writes and parses captions, `corpus.py` writes the
files. `toy_sound.py` makes the toy inputs of the recipes with sound.
"""
