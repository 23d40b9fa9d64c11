"""Readiness: a small picture sent through the whole graph, as a client's would go."""

import asyncio
import base64
import logging
import time

from pipelines.data.schema import IMAGE
from pipelines.serving.adapters import AdapterTable
from pipelines.serving.errors import ApiError, unavailable
from pipelines.serving.graph import Models
from pipelines.serving.uploads import Upload
from pipelines.serving.wire import AnswerSettings, Prompt

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
FRESH_S = 5.0
"""A song is good for so long, however many ask."""
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAALUlEQVR4nGOM6jnBQEvARFPTRy0YtWDUglELRi0YtWDUglEL"
    "Ri0YtWDUAioCAOtRAe7p4y8bAAAAAElFTkSuQmCC"
)
"""32 x 32 pixels."""


class Canary:
    """Sings where the models can be reached.

    Args:
        models: To send the picture to.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._lock = asyncio.Lock()
        self._sung_s: float | None = None

    async def sing(self, adapters: AdapterTable) -> None:
        """Return when the default adapter has answered, now or a moment ago.

        Raises:
            ApiError: 503 when it does not.
        """
        async with self._lock:
            if self._sung_s is not None and time.monotonic() - self._sung_s < FRESH_S:
                return
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await self._ask(adapters)
            except (ApiError, TimeoutError) as error:
                logger.warning("not ready: %r", error)
                raise unavailable("the models do not answer yet; try again") from None
            self._sung_s = time.monotonic()

    async def _ask(self, adapters: AdapterTable) -> None:
        adapter = adapters.default
        decoded = await self._models.decode(Upload(IMAGE, _PNG), adapter)
        if not adapter.generates:
            await self._models.embed(adapter, decoded)
            return
        rows = await self._models.soft_prompts(adapter, decoded, adapter.prompt)
        settings = AnswerSettings(max_new_tokens=1)
        await self._models.answer(Prompt(segments=(rows, adapter.prompt), settings=settings))
