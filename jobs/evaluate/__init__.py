"""A checkpoint and a manifest in, scores and captions out (`qformer evaluate`, `qformer caption`).

`job.py` is `qformer evaluate`, `caption.py` captions single files, `caption_corpus.py` a whole manifest. Protocols and
metrics are in `pipelines.evaluation`.
"""
