"""The ingress deployment: HTTP in, calls to the other deployments, HTTP out. Holds no model and loads no torch."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from pipelines.serving.app.quotas import Quotas
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import ApiKey, ServingConfig
from pipelines.serving.contract.errors import Refusal
from pipelines.serving.http.api import Api, build_http
from pipelines.serving.workers.graph import RemoteModels

logger = logging.getLogger(__name__)


class Ingress:
    """One replica. Which adapters and keys there are comes by `reconfigure`, so that a change restarts nothing."""

    def __init__(
        self,
        config: ServingConfig,
        media: DeploymentHandle,
        encoder: DeploymentHandle,
        generator: DeploymentHandle | None,
        quotas: DeploymentHandle | None,
    ) -> None:
        self._api = Api(config, RemoteModels(media, encoder, generator, quotas))

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take what `live_config` gives."""
        self._api.update(*read_live_config(user_config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's hook: the ASGI application of this replica, made in the replica."""
        return build_http(self._api)


class QuotaKeeper:
    """The one place that counts requests of keys, for all ingress replicas."""

    def __init__(self, lease_s: float) -> None:
        self._quotas = Quotas(lease_s)

    async def take(self, key: ApiKey) -> int | Refusal:
        """See `Quotas`."""
        return self._quotas.take(key)

    async def give_back(self, key: ApiKey, lease: int) -> None:
        """See `Quotas`."""
        self._quotas.give_back(key, lease)


def live_config(adapters: Sequence[Adapter], keys: Sequence[ApiKey]) -> dict[str, Any]:
    """JSON-ready, for `Ingress.reconfigure`; keys are their hashes."""
    return {"adapters": [adapter.to_dict() for adapter in adapters], "keys": [asdict(key) for key in keys]}


def read_live_config(user_config: Mapping[str, Any]) -> tuple[list[Adapter], list[ApiKey]]:
    """The inverse of `live_config`."""
    adapters = [Adapter.from_dict(values) for values in user_config["adapters"]]
    return adapters, [ApiKey(**values) for values in user_config["keys"]]
