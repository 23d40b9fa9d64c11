"""Folder settings in, checked and claimed folders out.

`output.py` has the checks and file names of all output folders, `run.py` the folder of a training run, `checkpoint.py`
finds and describes checkpoints.
"""
