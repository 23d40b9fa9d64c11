"""Whole answers from an engine, for offline use with all requests at hand."""

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
    """Complete all requests on an engine without other callers.

    Returns:
        One entry for each request, in order: its answer, or its error (`RequestError`, `GenerationFailedError`).
    """
    results: list[Completion | Exception] = [QueueFullError("not run")] * len(requests)
    places: dict[int, int] = {}
    remaining = list(range(len(requests)))[::-1]
    while remaining or places:
        while remaining and engine.has_room:
            place = remaining.pop()
            try:
                places[engine.add(replace(requests[place], is_streamed=False))] = place
            except (RequestError, GenerationFailedError) as error:
                results[place] = error
        for number, outcome in engine.step():
            place = places.pop(number)
            if isinstance(outcome, Exception):
                results[place] = outcome
            else:
                assert outcome.finish_reason is not None, "a request that is not streamed has one outcome"
                results[place] = Completion(outcome.text, outcome.token_ids, outcome.finish_reason, outcome.usage)
    return results
