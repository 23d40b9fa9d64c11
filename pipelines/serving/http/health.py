"""Readiness: a small test picture goes through all models, like a client's."""

import asyncio
import base64
import logging
import time

from pipelines.data.schema import IMAGE
from pipelines.serving.contract.adapters import Adapter, AdapterTable
from pipelines.serving.contract.errors import ApiError, unavailable
from pipelines.serving.contract.uploads import Upload
from pipelines.serving.contract.wire import AnswerSettings, Prompt
from pipelines.serving.workers.graph import Models

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
FRESH_S = 5.0
"""Time for which a result is reused, whether the models answered or not."""
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAALUlEQVR4nGOM6jnBQEvARFPTRy0YtWDUglELRi0YtWDUglEL"
    "Ri0YtWDUAioCAOtRAe7p4y8bAAAAAElFTkSuQmCC"
)
"""Test picture of 32 x 32 pixels."""


class ReadinessProbe:
    """Readiness check; concurrent and shortly following calls share one run.

    Args:
        models: Models to check.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._run: asyncio.Task[bool] | None = None
        self._ended_s = 0.0

    async def check(self, adapters: AdapterTable) -> None:
        """Return when an adapter of each stage has answered, now or within the last `FRESH_S`.

        Raises:
            ApiError: 503 if one does not answer.
        """
        if self._run is None or (self._run.done() and time.monotonic() - self._ended_s >= FRESH_S):
            self._run = asyncio.create_task(self._check(adapters))
        if not await asyncio.shield(self._run):
            raise unavailable("the models do not answer yet; try again")

    async def _check(self, adapters: AdapterTable) -> bool:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                # The first adapter of each stage, because the stages use different models.
                for adapter in {adapter.stage: adapter for adapter in reversed(adapters.all)}.values():
                    await probe_models(self._models, adapter)
            return True
        except (ApiError, TimeoutError) as error:
            logger.warning("not ready: %r", error)
            return False
        finally:
            self._ended_s = time.monotonic()


async def probe_models(models: Models, adapter: Adapter) -> None:
    """Send the test picture through the models of an adapter.

    Raises:
        ApiError: If they do not answer.
    """
    decoded = await models.decode(Upload(IMAGE, _PNG), adapter)
    if not adapter.generates:
        await models.embed(adapter, decoded)
        return
    rows = await models.soft_prompts(adapter, decoded, adapter.prompt)
    await models.answer(Prompt(segments=(rows, adapter.prompt), settings=AnswerSettings(max_new_tokens=1)))
