"""Random seeds in, the demo's small frozen models out (`python -m jobs.demo.backbones`, into `jobs/demo/models`).

`vision.py` and `language.py` train the models on the output of `patches.py` and `language_batches.py`;
`jobs.demo.make_backbones` saves and checks them.
"""
