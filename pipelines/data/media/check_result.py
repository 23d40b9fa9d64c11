"""The result of checking one sample."""

from dataclasses import dataclass, field

from pipelines.data.failures import MediaError
from pipelines.data.media.facts import MediaFacts
from pipelines.data.media.stage_costs import StageCosts


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """Result of checking one sample; each part is None where it is not known."""

    error: MediaError | None = None
    size_bytes: int | None = None
    content_hash: str | None = None
    """`facts.content_hash` of the whole file, also where the sample is a part of it."""
    facts: MediaFacts | None = None
    costs: StageCosts = field(default_factory=StageCosts)
