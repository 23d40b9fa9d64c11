"""Calls from the ingress to other deployments: retried where a replica is lost, cancelled where the caller is gone."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from pipelines.serving.contract.errors import RETRY_AFTER_S, ApiError, internal_error, unavailable

logger = logging.getLogger(__name__)

MAX_TRIES = 4
"""A request that loses so many replicas in a row may be what kills them."""
FIRST_WAIT_S = 0.05
"""Before the second try; doubled for each further one."""

ResultT = TypeVar("ResultT")

_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError, TaskCancelledError)


async def call(start: Callable[[], Any], what: str) -> Any:
    """Await one call, from the start again when its replica dies. Only for calls that may be repeated.

    Args:
        start: Begins the call: `lambda: handle.remote(…)`.
        what: Of the deployment, for the log.

    Raises:
        ApiError: 503 when the deployment is busy or its replicas die again and again, 500 when the call fails.
    """
    for number in range(1, MAX_TRIES + 1):
        response = start()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            await _judge(error, what, number)
    raise unavailable()


async def stream(start: Callable[[], Any], what: str) -> AsyncGenerator[Any, None]:
    """The items of a streaming call; begun again when its replica dies before the first. Closing it ends the work.

    Raises:
        ApiError: As `call`; 503 as well when the replica dies later.
    """
    for number in range(1, MAX_TRIES + 1):
        response, has_begun = start(), False
        try:
            async for item in response:
                has_begun = True
                yield item
            return
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise
        except Exception as error:
            if has_begun and _is_loss(error):
                logger.warning("%s: a replica died in the middle of an answer: %r", what, error)
                raise unavailable("the answer was cut off, for its replica was lost; ask again") from None
            await _judge(error, what, number)
    raise unavailable()


async def _judge(error: Exception, what: str, number: int) -> None:
    """Return when the call is worth another try.

    Raises:
        ApiError: When it is not.
    """
    if isinstance(error, BackPressureError):
        message = "the server is busy; try again"
        raise ApiError(503, "overloaded", message, retry_after_s=RETRY_AFTER_S) from None
    if not _is_loss(error):
        logger.error("%s failed: %r", what, error)
        raise internal_error() from error
    logger.warning("%s: a replica was lost (try %d of %d): %r", what, number, MAX_TRIES, error)
    if number < MAX_TRIES:
        await asyncio.sleep(FIRST_WAIT_S * 2 ** (number - 1))


def _is_loss(error: Exception) -> bool:
    """Whether the replica is to blame, not what it was asked; an exception of our own code is a RayTaskError."""
    if isinstance(error, _LOST):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
