"""The Ray Serve application: ingress, media, encoder and generator, each scaled by itself, or all in one."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipelines.serving.app.fused import FusedService
from pipelines.serving.app.ingress import Ingress, QuotaKeeper, live_config
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import ApiKey, Scale, ServingConfig
from pipelines.serving.http.health import ask
from pipelines.serving.workers.calls import call
from pipelines.serving.workers.encoder import encoder_class
from pipelines.serving.workers.generator import GeneratorWorker, generator_options
from pipelines.serving.workers.graph import RemoteModels, accepted
from pipelines.serving.workers.media import MediaWorker

# Beyond a request's own deadline, so that one that a replica works on as it goes ends as it would have.
SHUTDOWN_GRACE_S = 10.0
# Requests a replica may hold beyond those it works on, so that the ingress can refuse in JSON.
SPARE_REQUESTS = 64


def build_app(
    config: ServingConfig, adapters: Sequence[Adapter] = (), keys: Sequence[ApiKey] = ()
) -> serve.Application:
    """Wire the deployments into an application for `serve.run` or a Serve config.

    Args:
        config: What replicas are made of.
        adapters: What they serve, the default first. None: a Serve config tells them as the deployments' user_config
            (`user_configs`).
        keys: Who may ask.

    A change of adapters and keys alone reaches running replicas, and no replica is restarted for it.
    """
    live = user_configs(config, adapters, keys) if adapters else {}
    deploy = functools.partial(
        _deployment,
        # Serve lets nobody else say that a deployment is the one that runs; `serve.run` would restart all its replicas
        # for a change of user_config. A Serve config's version is that of its arguments.
        version=hashlib.sha256(repr(config).encode()).hexdigest()[:16],
        graceful_shutdown_timeout_s=config.requests.timeout_s + SHUTDOWN_GRACE_S,
    )
    quotas = None
    if config.counts_quotas:
        one = Scale(max_replicas=1, num_cpus=0)
        quotas = deploy(QuotaKeeper, "Quotas", one, max_ongoing=1000).bind(2 * config.requests.timeout_s)
    models = () if config.fused else _models(config, deploy, live.get("Encoder"))
    front = deploy(
        serve.ingress()(FusedService if config.fused else Ingress),
        "Ingress",
        dataclasses.replace(config.ingress, num_cpus=config.num_cpus) if config.fused else config.ingress,
        use_gpu=config.fused and config.use_gpu,
        max_ongoing=config.requests.max_concurrent + SPARE_REQUESTS,
        user_config=live.get("Ingress"),
        # What waits for the models is bounded by what the ingress lets in.
        max_queued_requests=4 * config.requests.max_concurrent,
        # One line for each request is our own, with more in it than Serve's.
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    )
    return front.bind(config, *models, quotas)


def _models(
    config: ServingConfig, deploy: Callable[..., serve.Deployment], preloaded: dict[str, Any] | None
) -> tuple[serve.Application | None, ...]:
    """Media, encoder and generator, each a deployment; the last is None where no adapter answers in text."""
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
    """What deployments are told of adapters and keys, by their names; JSON-ready, keys as hashes."""
    front = {"Ingress": live_config(adapters, keys)}
    return front if config.fused else {**front, "Encoder": {"preload": adapters[0].to_dict()}}


async def rehearse(app: str, config: ServingConfig, adapter: Adapter) -> None:
    """Have a running application answer by an adapter that requests do not know yet.

    Raises:
        ApiError: When it does not.
    """

    def handle(name: str) -> DeploymentHandle:
        return serve.get_deployment_handle(name, app)

    if config.fused:
        front = handle("Ingress").rehearse
        accepted(await call(lambda: front.remote(adapter), "rehearsal"))
        return
    generator = None if config.backbones.language is None else handle("Generator")
    await ask(RemoteModels(handle("Media"), handle("Encoder"), generator, None), adapter)


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
        _internal=True,  # or no version could be given
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
        # A model that cannot be loaded fails soon, not after Serve's twenty tries.
        max_constructor_retry_count=2,
        **{"logging_config": LoggingConfig(enable_access_log=False), **options},
    )
