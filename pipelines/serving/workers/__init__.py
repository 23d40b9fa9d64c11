"""Models behind the endpoints: uploads and prompts in; pixels, embeddings and text out, one deployment each.

`media.py` fetches and decodes, `encoder.py` runs the vision encoder and the Q-Formers (`adapter_models.py`),
`generator.py` the language model. `graph.py` is the protocol by which the ingress calls them, `calls.py` its retries.
"""
