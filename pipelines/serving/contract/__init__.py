"""Types that clients and deployments share: requests, answers, errors, settings. No model and no Ray.

`schemas.py` defines request bodies, `openapi.py` and `openapi_answers.py` their documentation. `wire.py` holds the
values that deployments exchange, `config.py` the settings of a service, `adapters.py` the description of a checkpoint.
"""
