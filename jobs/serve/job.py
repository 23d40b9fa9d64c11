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
from jobs.settings.jobs import ServeSettings
from pipelines.data import storage
from pipelines.serving.contract.adapters import Adapter, Backbones, require_shared_backbones
from pipelines.serving.contract.config import ApiKey, ServingConfig
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.http.headers import is_loopback
from pipelines.serving.http.keys import read_keys
from qformer.errors import UserError

logger = logging.getLogger(__name__)

APP_NAME = "qformer"
MAX_KEY_FILE_BYTES = 2**20
# The service answers its own timeouts in JSON; the proxy's deadline only catches a service that is gone.
PROXY_GRACE_S = 10.0


def main(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM, then shut down; SIGHUP reads checkpoints and keys anew.

    Raises:
        UserError: If the port is taken, a checkpoint cannot be used, or the endpoint would be open to the network.
    """
    require_guarded(settings)
    what = what_to_serve(settings)
    require_free_port(settings.host, settings.port)
    with ray_session(settings.ray):
        _require_replicas(settings, what.config)
        # After Ray's start, which sets handlers of its own: on SIGTERM they abort, and Serve would be left half down.
        _exit_on_signals()
        with _served(settings, what) as url:
            names = ", ".join(adapter.name for adapter in what.adapters)
            print(f"serving {names} at {url}/v1, and a page to try them at {url}/; stop with Ctrl-C", flush=True)
            if what.adapters[0].generates:
                print(f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {url}/v1/caption", flush=True)
            _renew_on_hangup(settings, what)


@contextlib.contextmanager
def served(settings: ServeSettings) -> Iterator[str]:
    """Serve inside an initialised Ray for the length of a `with` block.

    Yields:
        The base URL; append "/v1/…" or "/healthz".

    Raises:
        UserError: If the port is taken or a checkpoint cannot be used.
    """
    what = what_to_serve(settings)
    require_free_port(settings.host, settings.port)
    with _served(settings, what) as url:
        yield url


@dataclass(frozen=True, slots=True)
class Served:
    """What a service is made of, and what it serves."""

    config: ServingConfig
    adapters: Sequence[Adapter]
    keys: Sequence[ApiKey]


def what_to_serve(settings: ServeSettings) -> Served:
    """Translate settings, and learn from the checkpoints what they are.

    Raises:
        UserError: If a checkpoint or the key file cannot be used, a file of a checkpoint is not as it was written,
            adapters do not share their backbones, or `generation` searches with beams.
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
    return Served(config, adapters, keys)


def require_guarded(settings: ServeSettings) -> None:
    """Check that nobody opens a service to the network by accident.

    Raises:
        UserError: If the host is not loopback, there are no API keys, and `allow_open` does not say that this is meant.
    """
    if not is_loopback(settings.host) and settings.api_keys is None and not settings.allow_open:
        raise UserError(
            f"host={settings.host} opens the service to the network without API keys; make a key with `qformer serve "
            "--make-key NAME --set api_keys=keys.json` and set api_keys, or set allow_open=true"
        )


def require_free_port(host: str, port: int) -> None:
    """Check that the address can be listened on.

    Raises:
        UserError: If it is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: connections of an earlier run that are still closing do not matter.
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
    """The same folder for processes that start elsewhere on this machine."""
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
        raise UserError(f"api_keys={file!r} holds no key, so nobody could ask; make one with --make-key NAME")
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
    """Leave through all `finally` blocks with exit code 0 on the first SIGINT or SIGTERM; ignore further ones."""

    def leave(*_: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        logger.info("shutting down")
        sys.exit(0)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, leave)


def _renew_on_hangup(settings: ServeSettings, now: Served) -> None:
    """Wait for signals, for ever; on SIGHUP serve what the settings' checkpoints and key file hold by then."""
    # A signal may come while this thread holds the queue's lock: of all locks, only this queue's bears that.
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()
    signal.signal(signal.SIGHUP, lambda *_: asked.put(None))
    while True:
        asked.get()
        try:
            what = what_to_serve(settings)
            renew(now, what)
        except Exception as error:  # a store that is away, a cluster that is short of something: it may pass
            mistake = find_user_error(error)
            logger.error("still serving what was: %s", mistake or repr(error), exc_info=mistake is None)
        else:
            now = what
            logger.info("now serving %s", ", ".join(adapter.version for adapter in now.adapters))


def renew(now: Served, wanted: Served) -> None:
    """Serve other adapters and keys than now, while requests go on: what is new answers once before clients ask it.

    Raises:
        UserError: If an adapter cannot be used.
    """
    known = {adapter.key for adapter in now.adapters}
    if wanted.config == now.config:  # else Serve starts other replicas, which load before they are asked
        asyncio.run(_try_out([adapter for adapter in wanted.adapters if adapter.key not in known], wanted.config))
    update(wanted)


async def _try_out(adapters: Sequence[Adapter], config: ServingConfig) -> None:
    """Send a picture through the running models for each adapter."""
    from pipelines.serving.app.app import check_adapter

    for adapter in adapters:
        try:
            async with asyncio.timeout(config.requests.timeout_s):
                await check_adapter(APP_NAME, config, adapter)
        except (ApiError, TimeoutError) as error:
            reason = find_user_error(error) or str(error) or f"it took longer than {config.requests.timeout_s:g} s"
            raise UserError(f"{adapter.version} at {adapter.folder} does not answer: {reason}") from error


def update(what: Served) -> None:
    """Put an application into Serve. Into a running one come other adapters and keys, while requests go on.

    Raises:
        UserError: If a replica cannot use them.
    """
    from ray import serve

    from pipelines.serving.app.app import build_app

    try:
        serve.run(build_app(what.config, what.adapters, what.keys), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise _why_not_deployed() or error from error


@contextlib.contextmanager
def _served(settings: ServeSettings, what: Served) -> Iterator[str]:
    from ray import serve

    # Serve's own progress lines tell a user nothing that this job does not say itself.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        # Its port would not be ours, and shutting it down would end the applications of others.
        raise UserError("Ray Serve already runs on this cluster; stop it (`serve shutdown`) or use another cluster")
    serve.start(
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.requests.timeout_s + PROXY_GRACE_S,
        },
        # The service writes a line for each request, and more in it; the proxy's own would keep the next one waiting.
        logging_config={"enable_access_log": False},
    )
    try:
        update(what)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield f"http://{host}:{settings.port}"
    finally:
        serve.shutdown()


def _why_not_deployed() -> UserError | None:
    """The user's mistake that a replica met when it started, None when it was none; Serve keeps it as text."""
    from ray import serve

    app = serve.status().applications.get(APP_NAME)
    messages = [deployment.message for deployment in app.deployments.values()] if app else []
    return find_user_error(RuntimeError("\n".join(messages)))
