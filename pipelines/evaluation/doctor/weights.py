"""Findings about weights: which were trained, and whether the frozen ones are unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipelines.evaluation.doctor.findings import Finding, Status, listed, not_recorded
from qformer.analysis.weight_changes import changed_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainables:
    """Trainable parameters as a run recorded them at a start."""

    names: list[str]
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Tensors of a checkpoint, with its name."""

    name: str
    """Name in messages, e.g. "step-00000500"."""
    tensors: Mapping[str, Tensor]
    is_own: bool = True
    """True: a checkpoint of the run; False: the checkpoint that it started from."""


def trainables(starts: Sequence[Trainables], newest: Weights | None) -> Finding:
    """List the trained parameters, and check whether all starts and the checkpoint agree.

    Args:
        starts: Records of the starts, in order.
        newest: Newest checkpoint; None: there is none.
    """
    topic = "trainables"
    if not starts:
        return not_recorded(topic, "neither starts.jsonl nor summary.json names them")
    last = starts[-1]
    names = set(last.names)
    parts: dict[str, int] = {}
    for name in last.names:
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + 1
    text_of_parts = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
    text = f"{last.parameters:,} numbers in {len(names)} tensors: {text_of_parts}"
    values = {"parameters": last.parameters, "tensors": len(names), "parts": parts}
    problems = []
    for number, start in enumerate(starts[:-1], start=1):
        if differing := sorted(names ^ set(start.names)):
            problems.append(f"start {number} trained others than the last: {listed(differing)}")
    if newest is not None:
        if missing := sorted(names - newest.tensors.keys()):
            problems.append(f"{newest.name} lacks {listed(missing)}")
        elif (count := sum(newest.tensors[name].numel() for name in names)) != last.parameters:
            problems.append(f"{newest.name} holds {count:,} numbers in them")
    if not problems:
        return Finding(topic=topic, status="ok", text=text, figures=values)
    advice = "the settings or the code changed in the middle of the run; start it anew in another output"
    return Finding(topic=topic, status="problem", text=f"{text}; {'; '.join(problems)}", advice=advice, figures=values)


def unchanged_trainables(starts: Sequence[Trainables], own: Sequence[Weights]) -> Finding:
    """Trainables that are equal in the oldest and the newest checkpoint.

    Args:
        starts: Records of the starts, in order.
        own: Checkpoints of the run, the oldest first.
    """
    topic = "trainables that moved"
    if not starts:
        return not_recorded(topic, "neither starts.jsonl nor summary.json names the trainables")
    if len(own) < 2:
        return Finding(topic=topic, status="unknown", text="there is only one checkpoint to compare")
    oldest, newest = own[0], own[-1]
    names = [name for name in starts[-1].names if name in oldest.tensors and name in newest.tensors]
    unchanged = sorted(set(names) - set(changed_tensors(oldest.tensors, newest.tensors, names)))
    between = f"between {oldest.name} and {newest.name}"
    if not unchanged:
        return Finding(topic=topic, status="ok", text=f"all {len(names)} moved {between}")
    all_unchanged = len(unchanged) == len(names)
    return Finding(
        topic=topic,
        status="problem" if all_unchanged else "warning",
        text=f"{len(unchanged)} of {len(names)} did not move {between}: {listed(unchanged)}",
        advice="see bad_steps.jsonl and optim.learning_rate"
        if all_unchanged
        else "a loss term of weight 0 may be the reason",
        figures={"unmoved": unchanged},
    )


def frozen_tensors(starts: Sequence[Trainables], weights: Sequence[Weights]) -> Finding:
    """Whether frozen tensors of the bridge are equal in all checkpoints.

    Args:
        starts: Records of the starts, in order.
        weights: Checkpoint that the run started from, if any, then those of the run, the oldest first.
    """
    topic = "frozen tensors"
    if not starts:
        return not_recorded(topic, "neither starts.jsonl nor summary.json names the trainables")
    if not weights or not weights[-1].is_own:
        return Finding(topic=topic, status="unknown", text="there is no checkpoint to check")
    newest = weights[-1]
    names = sorted(newest.tensors.keys() - {name for start in starts for name in start.names})
    if not names:
        return Finding(topic=topic, status="ok", text="every tensor of the bridge is trained")
    if len(weights) < 2:
        text = f"{len(names)} tensors are not trained; one checkpoint alone does not tell whether they moved"
        return Finding(topic=topic, status="unknown", text=text)
    found = {one.name: changed_tensors(one.tensors, newest.tensors, names) for one in weights[:-1]}
    found = {name: changed for name, changed in found.items() if changed}
    others = ", ".join(one.name for one in weights[:-1])
    if not found:
        text = f"{len(names)} tensors are not trained, and {newest.name} has them as {others} has"
        return Finding(topic=topic, status="ok", text=text, figures={"frozen": len(names), "moved": {}})
    text_of_parts = "; ".join(f"since {name}: {listed(changed)}" for name, changed in found.items())
    if all(not one.is_own for one in weights if one.name in found):
        text_of_parts += " (unless that checkpoint was changed after this run began)"
    return Finding(
        topic=topic,
        status="problem",
        text=f"frozen layers moved, up to {newest.name}, {text_of_parts}",
        advice="do not use these checkpoints: something changed weights that are not trained; train again",
        figures={"frozen": len(names), "moved": found},
    )


def backbones(recorded: Sequence[Mapping[str, str]], now: Mapping[str, Sequence[str] | str]) -> list[Finding]:
    """Whether the frozen models are those of the start of training.

    Args:
        recorded: SHA-256 of each frozen model by name, for each start.
        now: Current SHA-256 of each frozen model, one per dtype in which it may have been loaded, the likeliest first;
            or the reason, as text, why it could not be loaded.
    """
    if not recorded:
        return [not_recorded("frozen models", "no frozen_sha256 in starts.jsonl or summary.json")]
    return [_backbone(name, [one[name] for one in recorded if name in one], now) for name in sorted(recorded[-1])]


def finite(newest: Weights) -> Finding:
    """Whether a checkpoint's weights are finite."""
    bad = sorted(name for name, tensor in newest.tensors.items() if not bool(tensor.isfinite().all()))
    if not bad:
        return Finding(topic="weights", status="ok", text=f"every tensor of {newest.name} is finite")
    text = f"{newest.name} holds NaN or infinity in {len(bad)} tensors: {listed(bad)}"
    advice = "use an earlier checkpoint, and lower optim.learning_rate"
    return Finding(topic="weights", status="problem", text=text, advice=advice, figures={"bad": bad})


def _backbone(name: str, recorded: Sequence[str], now: Mapping[str, Sequence[str] | str]) -> Finding:
    topic, values = f"frozen {name}", {"recorded": list(recorded)}
    status: Status = "problem"
    if len(set(recorded)) > 1:
        text = f"the frozen {name} model was not the same at all {len(recorded)} starts of the run"
        advice = "it was replaced in the middle of the run; train again with one model throughout"
        return Finding(topic=topic, status=status, text=text, advice=advice, figures=values)
    sha, found = recorded[-1], now.get(name)
    if found is None or isinstance(found, str):
        text = f"SHA-256 {sha[:12]}… at the start, not compared: {found or 'it is not loaded here'}"
        return Finding(topic=topic, status="unknown", text=text, figures=values)
    if sha in found:
        text = f"the {name} model is byte for byte the one that training began with (SHA-256 {sha[:12]}…)"
        return Finding(topic=topic, status="ok", text=text, figures=values)
    text = f"the frozen {name} model has moved: SHA-256 {sha[:12]}… at the start, {found[0][:12]}… now"
    advice = "put the model of the training back in its place (another version or file?); the bridge fits no other"
    return Finding(topic=topic, status=status, text=text, advice=advice, figures={**values, "now": list(found)})
