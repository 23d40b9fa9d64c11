"""Findings about a run as a whole: checkpoints, restarts, quarantined rows, alarms, validation."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.doctor.findings import Finding, Status, listed, not_recorded

Record = Mapping[str, Any]

_QUARANTINE_SHARE = 0.01
_OVERFITTED = 0.7
"""Share of the run; a best validation before it gives a warning."""


def checkpoints(names: Sequence[str], damaged: Mapping[str, str], newest_step: int, steps: int | None) -> Finding:
    """Whether there are intact checkpoints, and one of the last step.

    Args:
        names: Names of all finished checkpoints, the newest first.
        damaged: Reasons of damage, by name of the checkpoint.
        newest_step: Step of the newest intact checkpoint; 0: there is none.
        steps: Planned steps of the run; None: unknown.
    """
    topic, values = "checkpoints", {"finished": list(names), "damaged": dict(damaged)}
    intact = [name for name in names if name not in damaged]
    damage_text = "; ".join(f"{name} is damaged ({why})" for name, why in damaged.items())
    if not intact:
        text = damage_text or "there is no finished checkpoint"
        advice = "train again in another output" if names else "let the run reach its first checkpoint_every steps"
        return Finding(topic=topic, status="problem", text=text, advice=advice, figures=values)
    text = f"{len(intact)} whole, the newest after {newest_step} steps"
    if damaged:
        advice = "take an earlier one; --resume steps over it. See whether the disk is sound"
        return Finding(topic=topic, status="problem", text=f"{text}; {damage_text}", advice=advice, figures=values)
    if steps is not None and newest_step < steps:
        text += f" of {steps}"
        advice = "the run goes on, ended early or was cut off; qformer train --resume goes on with it"
        return Finding(topic=topic, status="warning", text=text, advice=advice, figures=values)
    return Finding(topic=topic, status="ok", text=text, figures=values)


def restarts(starts: Sequence[Record] | None) -> Finding:
    """How often the workers were started, at which step and with how many workers."""
    topic = "starts"
    if starts is None:
        return not_recorded(topic, "no starts.jsonl")
    sizes = [start.get("workers", "?") for start in starts]
    at = [start.get("step", 0) for start in starts]
    values = {"steps": at, "workers": sizes}
    text = f"{len(starts)} start(s), at step {listed(at, 6)}, with {listed(sizes, 6)} worker(s)"
    commits = sorted({str(start.get("commit")) for start in starts})
    notes = [f"with different code ({listed(commits)})"] if len(commits) > 1 else []
    if any(one == other for one, other in zip(at, at[1:], strict=False)):
        notes.append("more than once from the same step: no checkpoint came in between")
    if not notes:
        return Finding(topic=topic, status="ok", text=text, figures=values)
    advice = "see events.jsonl for what ended them, and lower checkpoint_every"
    return Finding(topic=topic, status="warning", text=f"{text}; {'; '.join(notes)}", advice=advice, figures=values)


def quarantine(rows: Mapping[str, int] | None, reasons: Mapping[str, int] | None, max_share: float | None) -> Finding:
    """How many rows could not be used, and why.

    Args:
        rows: Counts rows_in, rows_used and rows_quarantined of the run; None: not recorded.
        reasons: Rows of the quarantine table by error class; None: there is no table.
        max_share: Allowed share of quarantined rows; None: unknown.
    """
    topic = "quarantine"
    if rows is None:
        return not_recorded(topic, "neither summary.json nor a checkpoint counts the rows")
    bad, num_rows = rows["rows_quarantined"], rows["rows_in"]
    share = bad / max(1, num_rows)
    why = ", ".join(f"{name} {count}" for name, count in sorted((reasons or {}).items(), key=lambda one: -one[1])[:4])
    text = f"{bad} of {num_rows} rows ({share:.1%}) could not be used{f': {why}' if bad and why else ''}"
    values = {"share": share, "reasons": dict(reasons or {})}
    if num_rows != rows["rows_used"] + bad:
        text = f"rows were lost: {num_rows} in, {rows['rows_used']} used, {bad} quarantined"
        return Finding(topic=topic, status="problem", text=text, advice="report this as a bug", figures=values)
    status: Status = "ok" if share <= _QUARANTINE_SHARE else "warning"
    if max_share is not None and share > max_share:
        status = "problem"
    advice = "" if status == "ok" else "see quarantine.parquet; mend the files and run qformer prepare"
    return Finding(topic=topic, status=status, text=text, advice=advice, figures=values)


def alarms(events: Sequence[Record] | None, num_stacks: int) -> Finding:
    """Alarms that the run raised.

    Args:
        events: Records of events.jsonl; None: there is no such file.
        num_stacks: Number of ranks whose stacks were written because a step hung.
    """
    topic = "alarms"
    if events is None:
        return not_recorded(topic, "no events.jsonl")
    texts = [str(event.get("text", "")) for event in events]
    found = [" ".join(text.split()) for text in texts if text.startswith("ALARM")]
    values = {"alarms": found}
    if num_stacks:
        found = [*found, f"a step hung: the stacks of {num_stacks} worker(s) are in stacks/"]
    if not found:
        return Finding(topic=topic, status="ok", text="none")
    more = f"{len(found)} in all, the last: " if len(found) > 1 else ""
    return Finding(topic=topic, status="warning", text=f"{more}{found[-1]}", advice="see events.jsonl", figures=values)


def validation(best: Record | None, last_step: int) -> Finding | None:
    """Whether the evaluation loss still falls; None where the run has no validation.

    Args:
        best: Content of best.json.
        last_step: Number of finished steps.
    """
    if best is None or not best.get("step"):
        return None
    step, loss, worse = int(best["step"]), float(best["loss"]), int(best.get("num_worse", 0))
    text = f"lowest loss {loss:.4f} at step {step} of {last_step}, {worse} validation(s) since"
    is_late = worse > 0 and step < _OVERFITTED * last_step
    return Finding(
        topic="validation",
        status="warning" if is_late else "ok",
        text=text,
        advice=f"the model has overfitted since then: use the checkpoint of step {step}, or set validation.patience"
        if is_late
        else "",
        figures={"step": step, "loss": loss},
    )
