"""Whole answers from an engine, for those who have all requests at hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qformer.generation.engine import Engine
from qformer.generation.requests.request import (
    EngineRequest,
    FinishReason,
    GenerationFailedError,
    QueueFullError,
    RequestError,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage


def complete(engine: Engine, requests: Sequence[EngineRequest]) -> list[Completion | Exception]:
    """Run requests to their ends on an engine that nobody else uses.

    Returns:
        One entry for each request, in order: its answer, or why there is none (`RequestError`,
        `GenerationFailedError`).
    """
    results: list[Completion | Exception] = [QueueFullError("not run")] * len(requests)
    places: dict[int, int] = {}
    left = list(range(len(requests)))[::-1]
    while left or places:
        while left and engine.has_room:
            place = left.pop()
            try:
                places[engine.add(replace(requests[place], is_streamed=False))] = place
            except (RequestError, GenerationFailedError) as error:
                results[place] = error
        for number, outcome in engine.step():
            place = places.pop(number)
            if isinstance(outcome, Exception):
                results[place] = outcome
            else:
                assert outcome.finish_reason is not None, "a request that is not streamed tells of its end alone"
                results[place] = Completion(outcome.text, outcome.token_ids, outcome.finish_reason, outcome.usage)
    return results
