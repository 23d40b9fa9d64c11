"""A checkpoint and a manifest in, scored rows out, over Ray Data; one file a protocol.

`retrieval.py` (with `gallery.py`) scores stage 1, `caption.py` stage 2; `caption_shards.py` captions a whole corpus.
`row_results.py` joins results and failures, so that every row of the manifest comes out once.
"""
