"""The Ray Serve application: ingress, media, encoder and generator, each scaled by itself."""

import dataclasses
from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig

from pipelines.serving.config import Scale, ServingConfig
from pipelines.serving.encoder import encoder_class
from pipelines.serving.generator import GeneratorWorker, LanguageSource
from pipelines.serving.ingress import Ingress, QuotaKeeper, live_config
from pipelines.serving.media import MediaWorker

# Requests a replica may hold beyond those it works on, so that the ingress can refuse in JSON.
SPARE_REQUESTS = 64


def build_app(config: ServingConfig) -> serve.Application:
    """Wire the deployments into an application for `serve.run` or a Serve config.

    A change of adapters or keys alone reaches running replicas as their user_config; no replica is restarted for it, as
    long as no adapter brings updates of the language model.
    """
    requests = config.requests
    first = config.adapters[0]
    media = _deployment(MediaWorker, "Media", config.media, max_ongoing=2 * config.decode_children).bind(
        config.media_limits, config.fetch, config.decode_children
    )
    encoder = _deployment(
        encoder_class(config.max_loaded_adapters),
        "Encoder",
        config.encoder,
        use_gpu=config.use_gpu,
        max_ongoing=2 * config.max_batch_frames,
        user_config={"preload": first.to_dict()},
    ).bind(dict(first.encoder), config.max_batch_frames, config.use_gpu)
    writers = [adapter for adapter in config.adapters if adapter.generates]
    generator = None
    if writers:
        generator = _deployment(
            GeneratorWorker,
            "Generator",
            config.generator,
            use_gpu=config.use_gpu,
            max_ongoing=2 * config.max_sequences,
        ).bind(
            LanguageSource.of(writers[0]),
            kv_tokens=config.kv_tokens,
            max_sequences=config.max_sequences,
            max_prompt_tokens=requests.max_prompt_tokens,
            use_gpu=config.use_gpu,
        )
    quotas = None
    if config.keys:
        one = Scale(max_replicas=1, num_cpus=0)
        quotas = _deployment(QuotaKeeper, "Quotas", one, max_ongoing=1000).bind(2 * requests.timeout_s)
    ingress = _deployment(
        serve.ingress()(Ingress),
        "Ingress",
        config.ingress,
        max_ongoing=requests.max_concurrent + SPARE_REQUESTS,
        # What waits for the other deployments is bounded by what the ingress lets in.
        max_queued_requests=4 * requests.max_concurrent,
        user_config=live_config(config.adapters, config.keys),
        # One line for each request is our own, with more in it than Serve's.
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    )
    return ingress.bind(dataclasses.replace(config, adapters=(), keys=()), media, encoder, generator, quotas)


def _deployment(
    worker: type[Any], name: str, scale: Scale, *, max_ongoing: int, use_gpu: bool = False, **options: Any
) -> serve.Deployment:
    return serve.deployment(worker).options(
        name=name,
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
