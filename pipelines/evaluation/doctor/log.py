"""Findings from a run's log: losses against chance, their trend, waiting for data, bad steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.doctor.findings import Finding, Status, listed, not_recorded

Record = Mapping[str, Any]

DATA_BOUND, BADLY_DATA_BOUND = 0.1, 0.3
"""Shares of the time spent waiting for batches: from the first on a warning, from the second on a problem."""
_AT_CHANCE = 0.97
"""Share of the chance level above which a loss counts as no better than chance."""
_RISE, _RISE_SIGMAS = 1.05, 3.0
_MIN_RECORDS = 9
_MANY_OVERFLOWS = 0.05
_MANY_BAD_STEPS = 0.01


def data_wait(
    metrics: Sequence[Record], *, has_features: bool, decode_workers: int | None, queue_depth: float | None
) -> Finding:
    """Whether the run waits for data, over its last half.

    Args:
        metrics: Records of metrics.jsonl.
        has_features: Whether the run reads a feature cache.
        decode_workers: Number of decode workers; None: unknown.
        queue_depth: Mean number of ready batches over the run; None: unknown.
    """
    topic = "data-bound share"
    records = [record for record in _last_half(metrics) if _is_number(record.get("data_wait_share"))]
    if not records:
        return not_recorded(topic, "no data_wait_share in metrics.jsonl")
    share = _mean(records, "data_wait_share")
    values: dict[str, float] = {"share": share, "records": len(records)}
    text = f"training waits for batches {share:.0%} of the time"
    if queue_depth is not None:
        values["queue_depth"] = queue_depth
        text += f", with {queue_depth:.1f} batches ready on average over the run"
    if share < DATA_BOUND:
        return Finding(topic=topic, status="ok", text=f"{text} (below {DATA_BOUND:.0%} is fine)", figures=values)
    stage = _slowest(records)
    workers = "" if decode_workers is None else f" ({decode_workers} now)"
    more = f"raise decode_workers{workers}"
    advice = f"{more}, or put the cache on a faster disk" if has_features else f"{more}, or cache the encoder's output"
    advice += "" if has_features else " (qformer features, data.features)"
    return Finding(
        topic=topic,
        status="problem" if share >= BADLY_DATA_BOUND else "warning",
        text=f"the run is data-bound: {text}{f'; most of the data work is to {stage}' if stage else ''}",
        advice=advice,
        figures=values,
    )


def losses(metrics: Sequence[Record], weights: Mapping[str, float]) -> list[Finding]:
    """Whether losses are finite, below chance, and not rising.

    Args:
        metrics: Records of metrics.jsonl.
        weights: Weight of each loss term; a term of weight 0 is not trained and not checked. Missing terms weigh 1.
    """
    if not metrics:
        return [not_recorded("losses", "metrics.jsonl is missing or empty")]
    names = sorted({name for record in metrics for name in record if name.startswith("loss/")})
    bad = [f"{name} at step {_step(record)}" for record in metrics for name in names if not _is_finite(record, name)]
    if bad:
        text = f"losses are not finite: {listed(bad)}"
        advice = "lower optim.learning_rate, or train with precision=bf16 or fp32; see bad_steps.jsonl"
        return [Finding(topic="losses", status="problem", text=text, advice=advice, figures={"bad": len(bad)})]
    last = _last_part(metrics)
    means = {name.removeprefix("loss/"): _mean(last, name) for name in names if all(name in one for one in last)}
    values_text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    first = Finding(topic="losses", status="ok", text=f"finite; at the end {values_text}", figures=means)
    trained = [name for name in names if weights.get(name.removeprefix("loss/"), 1.0) > 0]
    trained_means = {name: value for name, value in means.items() if f"loss/{name}" in trained}
    return [first, _against_chance(last, trained_means), _trend(metrics, trained)]


def steps(metrics: Sequence[Record], bad_steps: Sequence[Record], precision: str | None) -> list[Finding]:
    """Steps left out, gradient spikes, fp16 overflows.

    Args:
        metrics: Records of metrics.jsonl.
        bad_steps: Records of bad_steps.jsonl; empty without the file.
        precision: Precision of the run; None: unknown.
    """
    done = max((_step(record) for record in metrics), default=0)
    found = [_bad_steps(bad_steps, done)]
    if any("gradient_norm_spikes" in record for record in metrics):
        spikes = _counted(metrics, "gradient_norm_spikes")
        found.append(
            Finding(
                topic="gradient spikes",
                status="warning" if spikes else "ok",
                text=f"{spikes} steps had a gradient far above the usual (it was clipped)",
                advice="a few do no harm; with many, lower optim.learning_rate or clip_norm" if spikes else "",
                figures={"spikes": spikes},
            )
        )
    if precision == "fp16" or any("overflows" in record for record in metrics):
        overflows, share = _counted(metrics, "overflows"), _counted(metrics, "overflows") / max(1, done)
        is_bad = share > _MANY_OVERFLOWS
        found.append(
            Finding(
                topic="fp16 overflows",
                status="warning" if is_bad else "ok",
                text=f"{overflows} of {done} steps were left out to find the loss scale",
                advice="use precision=bf16 where the GPU has it" if is_bad else "",
                figures={"overflows": overflows, "share": share},
            )
        )
    return found


def _bad_steps(bad_steps: Sequence[Record], done: int) -> Finding:
    count, share = len(bad_steps), len(bad_steps) / max(1, done)
    if not count:
        return Finding(topic="bad steps", status="ok", text="no step was left out for want of a finite gradient")
    steps_text = listed([record.get("step", "?") for record in bad_steps])
    status: Status = "problem" if share > _MANY_BAD_STEPS else "warning"
    return Finding(
        topic="bad steps",
        status=status,
        text=f"{count} of {done} steps had no finite gradient and changed nothing: {steps_text}",
        advice="look at their samples in bad_steps.jsonl, or lower optim.learning_rate",
        figures={"bad_steps": count, "share": share},
    )


def _against_chance(last: Sequence[Record], means: Mapping[str, float]) -> Finding:
    chances = {
        name: _mean(last, f"chance/{name}") for name in means if all(f"chance/{name}" in record for record in last)
    }
    chances = {name: value for name, value in chances.items() if value > 0}
    if not chances:
        if "itc" in means:
            return not_recorded("chance", "metrics.jsonl holds no chance levels")
        return Finding(topic="chance", status="ok", text="this stage's losses have no chance level that is known")
    values_text = ", ".join(f"{name} {means[name]:.3f} (chance {value:.3f})" for name, value in chances.items())
    idle = [name for name, value in chances.items() if means[name] > _AT_CHANCE * value]
    status: Status = "ok" if not idle else "problem" if len(idle) == len(chances) else "warning"
    words = f"no better than chance: {', '.join(idle)}" if idle else "all below chance"
    advice = "see whether captions and media belong together, then train longer or at another rate" if idle else ""
    text = f"{words}; {values_text}"
    return Finding(topic="chance", status=status, text=text, advice=advice, figures={"chance": chances})


def _trend(metrics: Sequence[Record], names: Sequence[str]) -> Finding:
    third = len(metrics) // 3
    if len(metrics) < _MIN_RECORDS:
        text = f"too few records ({len(metrics)}) to tell whether losses rise"
        return Finding(topic="course of losses", status="unknown", text=text)
    middle, last = metrics[third : 2 * third], metrics[2 * third :]
    rising = {}
    for name in names:
        if all(name in record for record in (*middle, *last)):
            before, after = _mean(middle, name), _mean(last, name)
            error = math.hypot(_error(middle, name), _error(last, name))
            if after > _RISE * before and after - before > _RISE_SIGMAS * error:
                rising[name.removeprefix("loss/")] = (before, after)
    if not rising:
        return Finding(topic="course of losses", status="ok", text="no loss rises towards the end")
    values_text = ", ".join(f"{name} from {before:.3f} to {after:.3f}" for name, (before, after) in rising.items())
    return Finding(
        topic="course of losses",
        status="warning",
        text=f"rising in the last third: {values_text}",
        advice="lower optim.learning_rate, or go back to an earlier checkpoint",
        figures={"rising": {name: list(pair) for name, pair in rising.items()}},
    )


def _last_half(metrics: Sequence[Record]) -> Sequence[Record]:
    """Last half, without the first record, which includes the start of the data pipeline."""
    return metrics[max(len(metrics) // 2, min(1, len(metrics) - 1)) :]


def _last_part(metrics: Sequence[Record]) -> Sequence[Record]:
    return metrics[-max(1, min(20, len(metrics) // 5)) :]


def _slowest(records: Sequence[Record]) -> str | None:
    """Most expensive stage of the data pipeline."""
    stages = ("fetch", "decode", "transform")
    seconds = {name: sum(float(record.get(f"data/{name}_s", 0.0)) for record in records) for name in stages}
    return max(stages, key=lambda name: seconds[name]) if any(seconds.values()) else None


def _counted(metrics: Sequence[Record], name: str) -> int:
    """Sum of a counter that restarts at 0 when a run is resumed."""
    total = previous = 0
    for value in (int(record[name]) for record in metrics if _is_number(record.get(name))):
        total += value - previous if value >= previous else value
        previous = value
    return total


def _mean(records: Sequence[Record], name: str) -> float:
    return sum(float(record[name]) for record in records) / max(1, len(records))


def _error(records: Sequence[Record], name: str) -> float:
    """Standard error of the mean."""
    mean = _mean(records, name)
    squares = sum((float(record[name]) - mean) ** 2 for record in records)
    return math.sqrt(squares / max(1, len(records) - 1) / max(1, len(records)))


def _is_finite(record: Record, name: str) -> bool:
    return name not in record or (_is_number(record[name]) and math.isfinite(record[name]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _step(record: Record) -> int:
    return int(record.get("step", 0))
