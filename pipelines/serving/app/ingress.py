"""The ingress deployment: serves HTTP and calls the other deployments. It holds no model and loads no torch."""

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
    """One ingress replica. `reconfigure` sets adapters and keys, so a change of them restarts nothing."""

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
        """Serve the adapters and keys of a `live_config`."""
        self._api.update(*read_live_config(user_config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the ASGI application of this replica; Ray Serve calls this in the replica."""
        return build_http(self._api)


class QuotaWorker:
    """Deployment of one replica that counts the requests of API keys for all ingress replicas."""

    def __init__(self, lease_s: float) -> None:
        self._quotas = Quotas(lease_s)

    async def take(self, key: ApiKey) -> int | Refusal:
        """Call `Quotas.take`."""
        return self._quotas.take(key)

    async def give_back(self, key: ApiKey, lease: int) -> None:
        """Call `Quotas.give_back`."""
        self._quotas.give_back(key, lease)


def live_config(adapters: Sequence[Adapter], keys: Sequence[ApiKey]) -> dict[str, Any]:
    """User config of `Ingress.reconfigure`: JSON-ready, with API keys as hashes."""
    return {"adapters": [adapter.to_dict() for adapter in adapters], "keys": [asdict(key) for key in keys]}


def read_live_config(user_config: Mapping[str, Any]) -> tuple[list[Adapter], list[ApiKey]]:
    """The inverse of `live_config`."""
    adapters = [Adapter.from_dict(values) for values in user_config["adapters"]]
    return adapters, [ApiKey(**values) for values in user_config["keys"]]
