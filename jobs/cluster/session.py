"""One Ray cluster for the length of a job: joined when one is named, else started here and stopped after."""

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.cluster.circumstances import num_usable_cpus
from jobs.settings.data import RaySettings
from qformer.errors import UserError

logger = logging.getLogger(__name__)

MIN_LOCAL_CPUS = 4
"""Logical CPUs of a cluster started here: with fewer, decoding starves behind the trainers waiting for it."""

CONNECT_TIMEOUT_S = 10.0

_START_TRIES = 3
_LATE = ("timed out during startup", "Deadline Exceeded")
"""Parts of what Ray says when its own processes took longer than the 30 s that it gives them."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # When this process runs under `uv run`, Ray would start every worker so, and resolve packages anew.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Half the time from the end of a training loop to fit()'s return is this poll (default 2 s); each of them takes
    # time of the training.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Every execution would print its plan and progress between a job's own lines.
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # The newer Parquet reader starts 32 actors for each read, whatever its size.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # Keeps CUDA_VISIBLE_DEVICES as it is for tasks that ask for no GPU, which is Ray's coming default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Shorten Serve's way between processes (its replicas listen there in any case, and want the token), and save a
    # thread between event loops: nothing of ours blocks one.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Each line is written once: to Serve's files, not to the process's stderr as well, which nobody reads here.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Spares a small request the replica's call back for its body.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.body_ahead.proxy_middlewares",
}

_OF_PROCESSES = {
    # A proxy calls replicas from the event loop that it reads requests on. This process has no such loop, so it is
    # for those that Ray starts alone.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # The rest spares a training on few cores what nobody asks for on a cluster that is this machine alone, and has no
    # dashboard: an actor that looks whether a node will be taken away,
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # the history of tasks and the statistics of event loops,
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    # and a look for new log files ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
}


def set_ray_environment() -> None:
    """Choose Ray's settings that it reads from the environment only.

    Call before the first `import ray`: some are read when its modules load. What the user has set stays.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def environment_of_processes() -> Iterator[None]:
    """Have settings in the environment, for the length of a `with` block, that are for Ray's own processes alone.

    Start a cluster inside; this process imports ray.serve later. What the user has set stays.
    """
    added = {name: value for name, value in _OF_PROCESSES.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def joins_cluster(settings: RaySettings) -> bool:
    """Whether a session joins a cluster that somebody else has started."""
    return (settings.address or os.environ.get("RAY_ADDRESS") or "local") != "local"


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Have Ray initialised inside the `with` block.

    Joins `settings.address`, else the cluster named by RAY_ADDRESS (as under `ray job submit`), else starts a
    cluster in this machine that wants a token. An already initialised Ray is used and left alone.

    Args:
        settings: Address, or the size of the cluster to start.

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
    """Check that an initialised Ray has what a job will wait for.

    Args:
        settings: As given to `ray_session`.
        cpus: CPUs that the job keeps, by the setting that asks for them.
        gpus: Likewise.

    Raises:
        UserError: If a cluster started here has less. One that was joined may grow: there a warning is logged.
    """
    import ray

    found = ray.cluster_resources()
    for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
        needed, there = sum(wanted.values()), int(found.get(kind, 0))
        if needed <= there:
            continue
        asked = " and ".join(f"{name}={count:g}" for name, count in wanted.items())
        if settings.address or os.environ.get("RAY_ADDRESS"):
            logger.warning("%s need %g %ss; the cluster has %d, so the job waits", asked, needed, kind, there)
        else:
            remedy = "lower them, raise ray.num_cpus" if kind == "CPU" else "set use_gpu=false"
            raise UserError(
                f"{asked} need {needed:g} {kind}s, this machine's Ray has {there}; {remedy}, or use a cluster"
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
    """Find out in seconds that nothing listens at host:port; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like name no port
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
            with environment_of_processes():
                ray.init(
                    address="local",  # never a cluster that merely happens to run on this machine
                    num_cpus=settings.num_cpus or max(MIN_LOCAL_CPUS, num_usable_cpus()),
                    include_dashboard=False,  # its ten processes take time of the training
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # of no class of its own
            if not any(text in str(error) for text in _LATE):
                raise
            if not left:
                raise UserError(
                    f"Ray did not start here, {_START_TRIES} times ({' '.join(str(error).split())[:100]}): is this "
                    "machine very busy, or short of memory? Try again when it is less so"
                ) from error
            logger.warning("Ray did not start within half a minute; this machine is very busy. Trying again")


def _provide_token() -> None:
    """Give a new local cluster a token of its own, held in this process's environment only.

    Ray guards a new cluster with a token and would write one to ~/.ray/auth_token, where it changes how every
    later `ray start` of this user behaves. A token or mode that the user has chosen is used as it is.
    """
    chosen = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not chosen and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
