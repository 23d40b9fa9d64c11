"""Answer POST /v1/caption over HTTP with a stage-2 checkpoint."""

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from jobs.checkpoint import checkpoint_name, open_checkpoint
from jobs.cli import find_user_error, run_job
from jobs.cluster_session import ray_session, require_resources
from jobs.settings import ServeSettings
from pipelines.data.bridge_decoding import decoding_of
from pipelines.data.samples import Limits
from pipelines.serving.config import ServingConfig
from qformer.errors import UserError

logger = logging.getLogger(__name__)

APP_NAME = "qformer"
ROUTE = "/v1/caption"
# The service answers its own timeouts in JSON; the proxy's deadline only catches a service that is gone.
PROXY_GRACE_S = 10.0


def main(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM, then shut down.

    Raises:
        UserError: If the port is taken or the checkpoint cannot be used.
    """
    config = serving_config(settings)
    require_free_port(settings.host, settings.port)
    with ray_session(settings.ray):
        replicas = {"min_replicas": max(1, settings.min_replicas)}
        require_resources(settings.ray, replicas, gpus=replicas if settings.use_gpu else {})
        # After Ray's start, which sets handlers of its own: on SIGTERM they abort, and Serve would be left half down.
        _exit_on_signals()
        with _served(settings, config) as url:
            print(f"serving {config.model_name} at {url}{ROUTE}; stop with Ctrl-C")
            print(f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {url}{ROUTE}", flush=True)
            threading.Event().wait()


@contextlib.contextmanager
def served(settings: ServeSettings) -> Iterator[str]:
    """Serve inside an initialised Ray for the length of a `with` block.

    Yields:
        The base URL; append "/v1/caption" or "/healthz".

    Raises:
        UserError: If the port is taken or the checkpoint cannot be used.
    """
    config = serving_config(settings)
    require_free_port(settings.host, settings.port)
    with _served(settings, config) as url:
        yield url


def serving_config(settings: ServeSettings) -> ServingConfig:
    """Translate settings, and learn from the checkpoint how to decode.

    Raises:
        UserError: If the checkpoint is not of stage 2, or the replica bounds cross.
    """
    checkpoint, info = open_checkpoint(settings.checkpoint)
    if info.stage != 2:
        raise UserError(f"checkpoint={settings.checkpoint} is of stage {info.stage}; serving captions needs stage 2")
    if settings.min_replicas > settings.max_replicas:
        raise UserError(
            f"min_replicas={settings.min_replicas} exceeds max_replicas={settings.max_replicas}; raise max_replicas"
        )
    return ServingConfig(
        checkpoint=checkpoint,
        model_name=checkpoint_name(checkpoint),
        decode=decoding_of(info, Limits(**settings.limits.model_dump())),
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        max_concurrent_requests=settings.max_concurrent_requests,
        generation=settings.generation,
        max_batch_size=settings.max_batch_size,
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        use_gpu=settings.use_gpu,
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


def _exit_on_signals() -> None:
    """Leave through all `finally` blocks with exit code 0 on the first SIGINT or SIGTERM; ignore further ones."""

    def leave(*_: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        logger.info("shutting down")
        sys.exit(0)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, leave)


@contextlib.contextmanager
def _served(settings: ServeSettings, config: ServingConfig) -> Iterator[str]:
    from ray import serve

    from pipelines.serving.app import build_app

    # Serve's own progress lines tell a user nothing that this job does not say itself.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        # Its port would not be ours, and shutting it down would end the applications of others.
        raise UserError("Ray Serve already runs on this cluster; stop it (`serve shutdown`) or use another cluster")
    serve.start(
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.request_timeout_s + PROXY_GRACE_S,
        }
    )
    try:
        try:
            serve.run(build_app(config), name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            raise _why_not_deployed() or error from error
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


if __name__ == "__main__":
    sys.exit(run_job("serve"))
