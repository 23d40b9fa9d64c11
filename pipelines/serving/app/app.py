"""The Ray Serve application: ingress, media, encoder and generator, scaled separately or fused in one deployment."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipelines.serving.app.fused import FusedService
from pipelines.serving.app.ingress import Ingress, QuotaWorker, live_config
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import ApiKey, Scale, ServingConfig
from pipelines.serving.http.health import probe_models
from pipelines.serving.workers.calls import call
from pipelines.serving.workers.encoder import encoder_class
from pipelines.serving.workers.generator import GeneratorWorker, generator_options
from pipelines.serving.workers.graph import RemoteModels, unwrap
from pipelines.serving.workers.media import MediaWorker

# Added to a request's deadline, so that a replica that shuts down finishes the requests it has.
SHUTDOWN_GRACE_S = 10.0
# Requests that a replica may hold beyond its concurrency limit, so that the ingress can refuse them in JSON.
SPARE_REQUESTS = 64


def build_app(
    config: ServingConfig, adapters: Sequence[Adapter] = (), keys: Sequence[ApiKey] = ()
) -> serve.Application:
    """Wire the deployments into an application for `serve.run` or a Serve config.

    Args:
        config: Settings of the replicas.
        adapters: Adapters to serve, the default first. Empty: the user_config of the deployments in a Serve config
            gives them (`user_configs`).
        keys: Accepted API keys; empty lets everybody in.

    A change of adapters and keys alone reaches running replicas without a restart.
    """
    live = user_configs(config, adapters, keys) if adapters else {}
    deploy = functools.partial(
        _deployment,
        # Without an explicit version, `serve.run` restarts all replicas for a change of user_config. With a Serve
        # config, Serve derives the version from the arguments.
        version=hashlib.sha256(repr(config).encode()).hexdigest()[:16],
        graceful_shutdown_timeout_s=config.requests.timeout_s + SHUTDOWN_GRACE_S,
    )
    quotas = None
    if config.counts_quotas:
        one = Scale(max_replicas=1, num_cpus=0)
        quotas = deploy(QuotaWorker, "Quotas", one, max_ongoing=1000).bind(2 * config.requests.timeout_s)
    models = () if config.fused else _models(config, deploy, live.get("Encoder"))
    front = deploy(
        serve.ingress()(FusedService if config.fused else Ingress),
        "Ingress",
        dataclasses.replace(config.ingress, num_cpus=config.num_cpus) if config.fused else config.ingress,
        use_gpu=config.fused and config.use_gpu,
        max_ongoing=config.requests.max_concurrent + SPARE_REQUESTS,
        user_config=live.get("Ingress"),
        # The concurrency limit of the ingress bounds the queues of the models.
        max_queued_requests=4 * config.requests.max_concurrent,
        # `http.records` writes one line for each request, with more fields than Serve's access log.
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    )
    return front.bind(config, *models, quotas)


def _models(
    config: ServingConfig, deploy: Callable[..., serve.Deployment], preloaded: dict[str, Any] | None
) -> tuple[serve.Application | None, ...]:
    """Deployments of media, encoder and generator; the last is None where no adapter generates text."""
    media = deploy(MediaWorker, "Media", config.media, max_ongoing=2 * config.decode_children)
    encoder = deploy(
        encoder_class(config.max_loaded_adapters),
        "Encoder",
        config.encoder,
        use_gpu=config.use_gpu,
        max_ongoing=2 * config.max_batch_frames,
        user_config=preloaded,
    )
    generator = deploy(
        GeneratorWorker, "Generator", config.generator, use_gpu=config.use_gpu, max_ongoing=2 * config.max_sequences
    )
    options = generator_options(config)
    return (
        media.bind(config.media_limits, config.fetch, config.decode_children),
        encoder.bind(config.backbones.encoder, config.max_batch_frames, config.use_gpu),
        None if options is None else generator.bind(**options),
    )


def user_configs(
    config: ServingConfig, adapters: Sequence[Adapter], keys: Sequence[ApiKey]
) -> dict[str, dict[str, Any]]:
    """User configs with adapters and keys, by deployment name; JSON-ready, keys as hashes."""
    front = {"Ingress": live_config(adapters, keys)}
    return front if config.fused else {**front, "Encoder": {"preload": adapters[0].to_dict()}}


async def check_adapter(app: str, config: ServingConfig, adapter: Adapter) -> None:
    """Run a test picture through a running application with an adapter that it does not serve yet.

    Raises:
        ApiError: If the adapter does not answer.
    """

    def handle(name: str) -> DeploymentHandle:
        return serve.get_deployment_handle(name, app)

    if config.fused:
        front = handle("Ingress").check_adapter
        unwrap(await call(lambda: front.remote(adapter), "adapter check"))
        return
    generator = None if config.backbones.language is None else handle("Generator")
    await probe_models(RemoteModels(handle("Media"), handle("Encoder"), generator, None), adapter)


def _deployment(
    worker: type[Any],
    name: str,
    scale: Scale,
    *,
    version: str,
    max_ongoing: int,
    use_gpu: bool = False,
    **options: Any,
) -> serve.Deployment:
    return serve.deployment(worker).options(
        name=name,
        version=version,
        _internal=True,  # Serve accepts a version only with this
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": int(use_gpu)},
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_requests,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
            "downscale_to_zero_delay_s": scale.to_zero_delay_s,
        },
        max_ongoing_requests=max_ongoing,
        # A model that cannot be loaded fails after two tries, not after Serve's default of twenty.
        max_constructor_retry_count=2,
        **{"logging_config": LoggingConfig(enable_access_log=False), **options},
    )
