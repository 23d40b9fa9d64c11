"""The Ray Serve application: an ingress that speaks HTTP and decodes, and replicas of the model behind it."""

import logging

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from pipelines.serving.api import RETRY_AFTER_S, CaptionService, build_http
from pipelines.serving.config import ServingConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.model import CaptionModel

logger = logging.getLogger(__name__)

# Requests an ingress replica may hold beyond those it works on, so that it can refuse them in JSON.
SPARE_REQUESTS = 64


class ModelHandle:
    """The model replicas, seen from the ingress."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def caption(self, pixels: np.ndarray) -> str:
        """Caption uint8 [T, 3, H, W] on one of the replicas.

        Raises:
            ApiError: 503 when all replicas are busy or the chosen one died.
        """
        try:
            return await self._handle.caption.remote(pixels)
        except BackPressureError:
            raise ApiError(503, "overloaded", "the model is busy; try again", RETRY_AFTER_S) from None
        except (RayActorError, DeploymentUnavailableError) as error:
            logger.warning("a model replica was lost: %r", error)
            raise ApiError(503, "unavailable", "the model is not available; try again", RETRY_AFTER_S) from None

    async def ping(self) -> None:
        """Return when a replica answers."""
        await self._handle.ping.remote()


class Ingress:
    """HTTP in, decoding, one call to the model, JSON out. Holds no model."""

    def __init__(self, config: ServingConfig, model: DeploymentHandle) -> None:
        self._service = CaptionService(config, ModelHandle(model))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's hook: the ASGI application of this replica, made in the replica."""
        return build_http(self._service)


def build_app(config: ServingConfig) -> serve.Application:
    """Wire ingress and model into an application for `serve.run`."""
    model = serve.deployment(CaptionModel).options(
        name="CaptionModel",
        ray_actor_options={"num_cpus": 1, "num_gpus": int(config.use_gpu)},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.max_batch_size,
        },
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_concurrent_requests,
        # A model that cannot be loaded fails soon, not after Serve's twenty tries.
        max_constructor_retry_count=2,
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        ray_actor_options={"num_cpus": 1},
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": max(1, config.max_concurrent_requests // 2),
        },
        max_ongoing_requests=config.max_concurrent_requests + SPARE_REQUESTS,
    )
    return ingress.bind(config, model.bind(config))
