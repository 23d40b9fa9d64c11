"""A seed in, the video demo's corpus out: clips with and without sound, captions and the ground truth.

`scenes.py` draws what happens, `render.py` and `sound.py` make the clips, `grammar.py` writes and parses captions.
"""
