"""A `ServingConfig` and adapters in, a Ray Serve application out.

`app.py` sets what each deployment gets (replicas, CPUs, queues), `ingress.py` is the HTTP deployment, `fused.py` puts
all workers into the ingress replica, `quotas.py` counts requests of API keys, `client.py` calls a running service.
"""
