"""Online inference with Ray Serve: checkpoints in, an HTTP service with OpenAI's interface out.

Rooms, lowest first (imports go down this list only):

- `contract`: requests, answers, errors, settings and the values that cross processes. A new request field starts here.
- `workers`: media, encoder and language model, one deployment each, and calls to them.
- `http`: endpoints, authentication, limits, logs. A new endpoint is a method of `http.api.Api` and its route.
- `app`: the Ray Serve application, which wires the deployments and counts quotas.
- `console`: static files of the web page at `/`; no Python.

`body_ahead.py` only keeps an import path alive that clusters name in their environment.
"""
