"""Readiness: a small picture sent through the whole graph, as a client's would go."""

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
"""A song tells for so long, however it ended and however many ask."""
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAALUlEQVR4nGOM6jnBQEvARFPTRy0YtWDUglELRi0YtWDUglEL"
    "Ri0YtWDUAioCAOtRAe7p4y8bAAAAAElFTkSuQmCC"
)
"""32 x 32 pixels."""


class Canary:
    """Sings where the models can be reached: one song at a time, for all who ask meanwhile and a moment after.

    Args:
        models: To send the picture to.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._song: asyncio.Task[bool] | None = None
        self._ended_s = 0.0

    async def sing(self, adapters: AdapterTable) -> None:
        """Return when an adapter of each stage has answered, now or a moment ago.

        Raises:
            ApiError: 503 when one does not.
        """
        if self._song is None or (self._song.done() and time.monotonic() - self._ended_s >= FRESH_S):
            self._song = asyncio.create_task(self._sing(adapters))
        if not await asyncio.shield(self._song):
            raise unavailable("the models do not answer yet; try again")

    async def _sing(self, adapters: AdapterTable) -> bool:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                # The first of each stage, for stages ask different models.
                for adapter in {adapter.stage: adapter for adapter in reversed(adapters.all)}.values():
                    await ask(self._models, adapter)
            return True
        except (ApiError, TimeoutError) as error:
            logger.warning("not ready: %r", error)
            return False
        finally:
            self._ended_s = time.monotonic()


async def ask(models: Models, adapter: Adapter) -> None:
    """Send the picture through the models, as `adapter` has them read it.

    Raises:
        ApiError: When they do not answer.
    """
    decoded = await models.decode(Upload(IMAGE, _PNG), adapter)
    if not adapter.generates:
        await models.embed(adapter, decoded)
        return
    rows = await models.soft_prompts(adapter, decoded, adapter.prompt)
    await models.answer(Prompt(segments=(rows, adapter.prompt), settings=AnswerSettings(max_new_tokens=1)))
