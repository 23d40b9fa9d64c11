"""What a check of one sample told."""

from dataclasses import dataclass, field

from pipelines.data.failures import MediaError
from pipelines.data.media.facts import MediaFacts
from pipelines.data.media.stage_costs import StageCosts


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """What checking one sample told; each part is None where it could not be had."""

    error: MediaError | None = None
    size_bytes: int | None = None
    content_hash: str | None = None
    """See `facts.content_hash`: of the whole file, also where the sample is a part of it."""
    facts: MediaFacts | None = None
    costs: StageCosts = field(default_factory=StageCosts)
