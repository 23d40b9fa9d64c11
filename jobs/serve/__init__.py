"""Checkpoints in, a running service or a config for `serve deploy` out (`qformer serve`).

`job.py` starts and reloads a service, `config.py` writes Serve configs and builds the application on a cluster,
`make_key.py` makes API keys. The service itself is `pipelines.serving`.
"""
