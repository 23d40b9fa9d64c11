"""The Ray Serve application: ingress, media, encoder and generator, each scaled by itself."""

import hashlib
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pipelines.serving.adapters import Adapter
from pipelines.serving.config import ApiKey, Scale, ServingConfig
from pipelines.serving.encoder import encoder_class
from pipelines.serving.generator import GeneratorWorker, LanguageSource
from pipelines.serving.graph import RemoteModels
from pipelines.serving.ingress import Ingress, QuotaKeeper, live_config
from pipelines.serving.media import MediaWorker

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
    requests, version = config.requests, hashlib.sha256(repr(config).encode()).hexdigest()[:16]
    live = user_configs(adapters, keys) if adapters else {}

    def deployment(worker: type[Any], name: str, scale: Scale, **options: Any) -> serve.Deployment:
        return _deployment(
            worker,
            name,
            scale,
            version=version,
            user_config=live.get(name),
            graceful_shutdown_timeout_s=requests.timeout_s + SHUTDOWN_GRACE_S,
            **options,
        )

    media = deployment(MediaWorker, "Media", config.media, max_ongoing=2 * config.decode_children).bind(
        config.media_limits, config.fetch, config.decode_children
    )
    encoder = deployment(
        encoder_class(config.max_loaded_adapters),
        "Encoder",
        config.encoder,
        use_gpu=config.use_gpu,
        max_ongoing=2 * config.max_batch_frames,
    ).bind(config.backbones.encoder, config.max_batch_frames, config.use_gpu)
    generator = quotas = None
    if config.backbones.language is not None:
        generator = deployment(
            GeneratorWorker,
            "Generator",
            config.generator,
            use_gpu=config.use_gpu,
            max_ongoing=2 * config.max_sequences,
        ).bind(
            LanguageSource(**config.backbones.language, updated_by=config.backbones.updated_by),
            kv_tokens=config.kv_tokens,
            max_sequences=config.max_sequences,
            max_prompt_tokens=requests.max_prompt_tokens,
            use_gpu=config.use_gpu,
        )
    if config.counts_quotas:
        one = Scale(max_replicas=1, num_cpus=0)
        quotas = deployment(QuotaKeeper, "Quotas", one, max_ongoing=1000).bind(2 * requests.timeout_s)
    ingress = deployment(
        serve.ingress()(Ingress),
        "Ingress",
        config.ingress,
        max_ongoing=requests.max_concurrent + SPARE_REQUESTS,
        # What waits for the other deployments is bounded by what the ingress lets in.
        max_queued_requests=4 * requests.max_concurrent,
        # One line for each request is our own, with more in it than Serve's.
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    )
    return ingress.bind(config, media, encoder, generator, quotas)


def user_configs(adapters: Sequence[Adapter], keys: Sequence[ApiKey]) -> dict[str, dict[str, Any]]:
    """What deployments are told of adapters and keys, by their names; JSON-ready, keys as hashes."""
    return {"Ingress": live_config(adapters, keys), "Encoder": {"preload": adapters[0].to_dict()}}


def running_models(app: str, config: ServingConfig) -> RemoteModels:
    """The models of a running application, for those who ask them beside its ingress."""

    def handle(name: str) -> DeploymentHandle:
        return serve.get_deployment_handle(name, app)

    generator = None if config.backbones.language is None else handle("Generator")
    return RemoteModels(handle("Media"), handle("Encoder"), generator, None)


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
        # Serve lets nobody else say that a deployment is the one that runs; `serve.run` would restart all its replicas
        # for a change of user_config. A Serve config's version is that of its arguments.
        version=version,
        _internal=True,
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
