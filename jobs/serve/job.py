"""Serve checkpoints over HTTP."""

import asyncio
import contextlib
import logging
import os
import queue
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.cluster.exceptions import find_user_error
from jobs.cluster.session import joins_cluster, ray_session, require_resources
from jobs.folders.checkpoint import checkpoint_name, open_checkpoint, require_whole
from jobs.settings.serve import ServeSettings
from pipelines.data import storage
from pipelines.serving.contract.adapters import Adapter, Backbones, require_shared_backbones
from pipelines.serving.contract.config import ApiKey, ServingConfig
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.http.headers import is_loopback
from pipelines.serving.http.keys import MAX_KEY_FILE_BYTES, read_keys
from qformer.errors import UserError

logger = logging.getLogger(__name__)

APP_NAME = "qformer"
# The service answers timeouts itself, in JSON; the proxy's later deadline is for a service that no longer answers.
PROXY_GRACE_S = 10.0


def main(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM, then shut down; SIGHUP reloads checkpoints and keys.

    Raises:
        UserError: If the port is taken, a checkpoint cannot be used, or the endpoint would be open to the network.
    """
    require_protection(settings)
    service = resolve_service(settings)
    require_free_port(settings.host, settings.port)
    with ray_session(settings.ray):
        _require_replicas(settings, service.config)
        # After Ray's start, which sets its own handlers; on SIGTERM they would abort before Serve has shut down.
        _exit_on_signals()
        with _deployed(settings, service) as url:
            names = ", ".join(adapter.name for adapter in service.adapters)
            print(f"serving {names} at {url}/v1, and a page to try them at {url}/; stop with Ctrl-C", flush=True)
            if service.adapters[0].generates:
                print(f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {url}/v1/caption", flush=True)
            _reload_on_sighup(settings, service)


@contextlib.contextmanager
def running_service(settings: ServeSettings) -> Iterator[str]:
    """Serve inside an initialised Ray for the length of a `with` block.

    Yields:
        The base URL; append "/v1/…" or "/healthz".

    Raises:
        UserError: If the port is taken or a checkpoint cannot be used.
    """
    service = resolve_service(settings)
    require_free_port(settings.host, settings.port)
    with _deployed(settings, service) as url:
        yield url


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that a service consists of: settings, adapters and API keys."""

    config: ServingConfig
    adapters: Sequence[Adapter]
    keys: Sequence[ApiKey]


def resolve_service(settings: ServeSettings) -> Service:
    """Resolve settings to a service; reads the descriptions of the checkpoints.

    Raises:
        UserError: If a checkpoint or the key file cannot be used, a checkpoint is damaged, adapters do not share their
            backbones, or `generation` asks for beam search.
    """
    if settings.fused is None:
        settings = settings.model_copy(update={"fused": not joins_cluster(settings.ray)})
    adapters = [_adapter(settings.checkpoint, settings.name)]
    adapters += [_adapter(checkpoint, name) for name, checkpoint in settings.adapters.items()]
    require_shared_backbones(adapters)
    for adapter in adapters:
        require_whole(adapter.folder)
    keys = _keys(settings.api_keys)
    is_local = is_loopback(settings.host) and not settings.allow_open
    config = settings.config(Backbones.of(adapters), counts_quotas=bool(keys), is_local=is_local)
    return Service(config, adapters, keys)


def require_protection(settings: ServeSettings) -> None:
    """Check that a service that the network can reach is protected by API keys.

    Raises:
        UserError: If the host is not loopback, there are no API keys, and `allow_open` is not set.
    """
    if not is_loopback(settings.host) and settings.api_keys is None and not settings.allow_open:
        raise UserError(
            f"host={settings.host} opens the service to the network without API keys; make a key with `qformer serve "
            "--make-key NAME --set api_keys=keys.json` and set api_keys, or set allow_open=true"
        )


def require_free_port(host: str, port: int) -> None:
    """Check that a server can listen on the address.

    Raises:
        UserError: If the port is taken, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # The server sets it too, so closing connections of an earlier run do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port"
            ) from error


def _adapter(checkpoint: str, name: str | None) -> Adapter:
    folder, info = open_checkpoint(checkpoint)
    version = checkpoint_name(folder)
    return Adapter.of(info, name=name or version.split("/")[0], version=version, folder=_absolute(folder))


def _absolute(folder: str) -> str:
    """Absolute form of a local folder, for processes with another working directory."""
    return folder if "://" in folder else os.path.abspath(folder)


def _keys(file: str | None) -> tuple[ApiKey, ...]:
    if file is None:
        return ()
    try:
        content = storage.read_bytes(file, MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise UserError(
            f"api_keys={file!r} cannot be read ({error}); make it with `qformer serve --make-key NAME`"
        ) from error
    keys = read_keys(content, file)
    if not keys:
        raise UserError(f"api_keys={file!r} holds no key; make one with --make-key NAME")
    return keys


def _require_replicas(settings: ServeSettings, config: ServingConfig) -> None:
    """Check that the cluster has room for one replica of each deployment."""
    scales = {name: getattr(settings, name) for name in ("ingress", "media", "encoder", "generator")}
    if config.fused:
        counts = dict.fromkeys(scales, max(1, settings.ingress.min_replicas))
    else:
        counts = {name: max(1, scale.min_replicas) for name, scale in scales.items()}
    cpus = {f"{name}.num_cpus": scale.num_cpus * counts[name] for name, scale in scales.items()}
    gpus = {"ingress": 1} if config.fused else {"encoder": 1, "generator": 1}
    require_resources(settings.ray, cpus, gpus=gpus if settings.use_gpu else {})


def _exit_on_signals() -> None:
    """Exit with code 0, through all `finally` blocks, on the first SIGINT or SIGTERM; ignore further ones."""

    def leave(*_: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        logger.info("shutting down")
        sys.exit(0)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, leave)


def _reload_on_sighup(settings: ServeSettings, now: Service) -> None:
    """Wait for signals for ever; on SIGHUP, reload the checkpoints and the key file of the settings."""
    # A signal may arrive while this thread holds the lock of the queue; only SimpleQueue is reentrant.
    requests: queue.SimpleQueue[None] = queue.SimpleQueue()
    signal.signal(signal.SIGHUP, lambda *_: requests.put(None))
    while True:
        requests.get()
        try:
            service = resolve_service(settings)
            reload(now, service)
        except Exception as error:  # possibly transient: storage that is unreachable, a cluster without free resources
            mistake = find_user_error(error)
            logger.error(
                "reload failed, still serving the previous adapters: %s",
                mistake or repr(error),
                exc_info=mistake is None,
            )
        else:
            now = service
            logger.info("now serving %s", ", ".join(adapter.version for adapter in now.adapters))


def reload(now: Service, wanted: Service) -> None:
    """Replace adapters and keys without downtime; each new adapter must answer a test picture first.

    Raises:
        UserError: If an adapter cannot be used.
    """
    known = {adapter.key for adapter in now.adapters}
    # With another config, Serve starts new replicas, which load their models before they get requests.
    if wanted.config == now.config:
        asyncio.run(
            _check_adapters([adapter for adapter in wanted.adapters if adapter.key not in known], wanted.config)
        )
    deploy(wanted)


async def _check_adapters(adapters: Sequence[Adapter], config: ServingConfig) -> None:
    """Send a test picture through the running models for each adapter."""
    from pipelines.serving.app.app import check_adapter

    for adapter in adapters:
        try:
            async with asyncio.timeout(config.requests.timeout_s):
                await check_adapter(APP_NAME, config, adapter)
        except (ApiError, TimeoutError) as error:
            reason = find_user_error(error) or str(error) or f"it took longer than {config.requests.timeout_s:g} s"
            raise UserError(f"{adapter.version} at {adapter.folder} does not answer: {reason}") from error


def deploy(service: Service) -> None:
    """Deploy the application with Serve, or update adapters and keys of a running one without downtime.

    Raises:
        UserError: If a replica cannot load them.
    """
    from ray import serve

    from pipelines.serving.app.app import build_app

    try:
        serve.run(build_app(service.config, service.adapters, service.keys), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise _deployment_mistake() or error from error


@contextlib.contextmanager
def _deployed(settings: ServeSettings, service: Service) -> Iterator[str]:
    from ray import serve

    # Serve's progress lines repeat what this job prints.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        # The port is fixed by the running Serve, and a shutdown would end the applications of other users.
        raise UserError("Ray Serve already runs on this cluster; stop it (`serve shutdown`) or use another cluster")
    serve.start(
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.requests.timeout_s + PROXY_GRACE_S,
        },
        # The service logs each request itself; the proxy's log would only delay the next request.
        logging_config={"enable_access_log": False},
    )
    try:
        deploy(service)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield f"http://{host}:{settings.port}"
    finally:
        serve.shutdown()


def _deployment_mistake() -> UserError | None:
    """User error that stopped a replica at its start, from Serve's status text; None if there is none."""
    from ray import serve

    app = serve.status().applications.get(APP_NAME)
    messages = [deployment.message for deployment in app.deployments.values()] if app else []
    return find_user_error(RuntimeError("\n".join(messages)))
