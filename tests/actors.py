"""The end of an actor, for tests of what comes after it."""

import time
from typing import Any

import ray


def kill_actor(actor: Any) -> None:
    """Kill an actor and wait until every call to it fails: `ray.kill` returns earlier."""
    ray.kill(actor)
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=60.0)
        except ray.exceptions.ActorDiedError:
            return
        except ray.exceptions.ActorUnavailableError:
            pass  # its connection is gone; its death is not yet known
        time.sleep(0.01)
    raise TimeoutError(f"{actor} answers a minute after it was killed")
