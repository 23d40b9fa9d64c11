"""Calls from the ingress to other deployments: retried when a replica is lost, cancelled with their caller."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from pipelines.serving.contract.errors import RETRY_AFTER_S, ApiError, internal_error, unavailable

logger = logging.getLogger(__name__)

MAX_TRIES = 4
"""Tries of one call. A request that loses this many replicas in a row may be what crashes them."""
FIRST_WAIT_S = 0.05
"""Wait before the second try; doubled for each further one."""

ResultT = TypeVar("ResultT")

_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError, TaskCancelledError)


async def call(start: Callable[[], Any], what: str) -> Any:
    """Await one call, and repeat it when its replica is lost. Only for calls that may be repeated.

    Args:
        start: Function that begins the call: `lambda: handle.remote(…)`.
        what: Name of the call in the log.

    Raises:
        ApiError: 503 if the deployment is busy or replicas are lost in every try, 500 if the call fails.
    """
    for number in range(1, MAX_TRIES + 1):
        response = start()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            await _wait_or_raise(error, what, number)
    raise unavailable()


async def stream(start: Callable[[], Any], what: str) -> AsyncGenerator[Any, None]:
    """Yield the items of a streaming call, and repeat it when its replica is lost before the first item.

    Closing the iterator cancels the call.

    Raises:
        ApiError: 503 if the deployment is busy, or a replica is lost in every try or after the first item; 500 if the
            call fails.
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
            await _wait_or_raise(error, what, number)
    raise unavailable()


async def _wait_or_raise(error: Exception, what: str, number: int) -> None:
    """Wait if the call should be repeated.

    Raises:
        ApiError: If it should not.
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
    """Whether the replica was lost. An exception of the worker's own code is a RayTaskError, and no loss."""
    if isinstance(error, _LOST):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
