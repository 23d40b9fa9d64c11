"""The Ray session of a job: joins the configured cluster, or starts a local one and stops it at the end."""

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.cluster.environment import num_usable_cpus
from jobs.settings.data import RaySettings
from qformer.errors import UserError

logger = logging.getLogger(__name__)

MIN_LOCAL_CPUS = 4
"""Smallest number of logical CPUs of a local cluster: with fewer, decoding gets no CPU while trainers wait for it."""

CONNECT_TIMEOUT_S = 10.0

_START_TRIES = 3
_LATE = ("timed out during startup", "Deadline Exceeded")
"""Parts of Ray's message when its own processes do not start within 30 s."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run`, Ray would start every worker with it and resolve packages again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # fit() returns half such a poll after the end of training on average (default 2 s); shorter polls take CPU time
    # from the training.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Otherwise every execution prints its plan and progress between the lines of the job.
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # The newer Parquet reader starts 32 actors for each read, whatever its size.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # Leaves CUDA_VISIBLE_DEVICES unchanged for tasks without GPUs, the future default of Ray.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Faster calls between Serve's processes (replicas listen on gRPC in any case, behind the token), and one thread
    # less, because our deployments never block the event loop.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Write each line once, to Serve's log files, and not to stderr as well.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Saves small requests the call back for their body (`pipelines.serving.http.body_transfer`).
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.body_ahead.proxy_middlewares",
}

_PROCESS_ENVIRONMENT = {
    # A proxy may call replicas from its own event loop. The driver process has no such loop, so this is set only for
    # the processes that Ray starts.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # The rest saves CPU time for training on few cores; a local cluster without a dashboard does not need it:
    # an actor that watches for the preemption of nodes,
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # the history of tasks and the statistics of event loops,
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    # and a search for new log files ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
}


def set_ray_environment() -> None:
    """Set those of Ray's settings that it reads from the environment only.

    Call it before the first `import ray`, which reads some of them. Variables that the user has set stay.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_process_environment() -> Iterator[None]:
    """Set environment variables for Ray's own processes, for the length of a `with` block.

    Start the cluster inside the block. The driver must not keep the variables, because it imports ray.serve later.
    Variables that the user has set stay.
    """
    added = {name: value for name, value in _PROCESS_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def joins_cluster(settings: RaySettings) -> bool:
    """Whether a session joins a running cluster."""
    return (settings.address or os.environ.get("RAY_ADDRESS") or "local") != "local"


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Initialise Ray for the length of a `with` block.

    Joins `settings.address`, else the cluster in RAY_ADDRESS (set by `ray job submit`), else starts a local cluster
    behind a token. An already initialised Ray is used and not shut down.

    Args:
        settings: Address of a cluster, or the size of the local one.

    Raises:
        UserError: If the named cluster cannot be reached.
    """
    set_ray_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _join(address)
    else:
        _start(settings)
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(settings: RaySettings, cpus: Mapping[str, float], gpus: Mapping[str, float]) -> None:
    """Check that an initialised Ray has the resources that a job needs.

    Args:
        settings: Settings of the `ray_session`.
        cpus: Reserved CPUs, by the setting that asks for them.
        gpus: Reserved GPUs, by the setting that asks for them.

    Raises:
        UserError: If a local cluster has fewer. A joined cluster may grow, so there a warning is logged.
    """
    import ray

    found = ray.cluster_resources()
    for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
        needed, available = sum(wanted.values()), int(found.get(kind, 0))
        if needed <= available:
            continue
        asked = " and ".join(f"{name}={count:g}" for name, count in wanted.items())
        if settings.address or os.environ.get("RAY_ADDRESS"):
            logger.warning("%s need %g %ss; the cluster has %d, so the job waits", asked, needed, kind, available)
        else:
            remedy = "lower them, raise ray.num_cpus" if kind == "CPU" else "set use_gpu=false"
            raise UserError(
                f"{asked} need {needed:g} {kind}s, this machine's Ray has {available}; {remedy}, or use a cluster"
            )


def _join(address: str) -> None:
    import ray

    _require_listener(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no Ray cluster answers at {address!r} ({reason}); check ray.address or RAY_ADDRESS, and "
            "RAY_AUTH_TOKEN if the cluster asks for a token"
        ) from error


def _require_listener(address: str) -> None:
    """Check within seconds that something listens at host:port; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # no port in "auto" and similar
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster listens at {address!r} ({error}); check ray.address or RAY_ADDRESS, or leave both "
            "out to start a cluster here"
        ) from error


def _start(settings: RaySettings) -> None:
    import ray

    _provide_token()
    for left in reversed(range(_START_TRIES)):
        try:
            with ray_process_environment():
                ray.init(
                    address="local",  # never a cluster of another user on this machine
                    num_cpus=settings.num_cpus or max(MIN_LOCAL_CPUS, num_usable_cpus()),
                    include_dashboard=False,  # its ten processes take CPU time from the training
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # Ray raises no specific class
            if not any(text in str(error) for text in _LATE):
                raise
            if not left:
                raise UserError(
                    f"Ray did not start here, {_START_TRIES} times ({' '.join(str(error).split())[:100]}): is this "
                    "machine very busy, or short of memory? Try again when it is less so"
                ) from error
            logger.warning("Ray did not start within half a minute; this machine is very busy. Trying again")


def _provide_token() -> None:
    """Set a new token for a local cluster, in the environment of this process only.

    Ray protects a new cluster with a token and would write it to ~/.ray/auth_token, which changes every later
    `ray start` of this user. A token or mode that the user has chosen is kept.
    """
    chosen = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not chosen and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
