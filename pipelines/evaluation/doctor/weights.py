"""What was trained, and whether what was not trained stayed as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipelines.evaluation.doctor.findings import Finding, Status, listed, not_recorded
from qformer.analysis.weight_changes import changed_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainables:
    """What a run wrote down of its trainables when it started."""

    names: list[str]
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Tensors of a checkpoint."""

    place: str
    """For people, e.g. "step-00000500"."""
    tensors: Mapping[str, Tensor]
    is_own: bool = True
    """Of the run itself; False: of a checkpoint that it started from."""


def trainables(starts: Sequence[Trainables], newest: Weights | None) -> Finding:
    """What was trained, and whether every start and the checkpoint say the same.

    Args:
        starts: As recorded, the first start first.
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
    told = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
    text = f"{last.parameters:,} numbers in {len(names)} tensors: {told}"
    values = {"parameters": last.parameters, "tensors": len(names), "parts": parts}
    problems = []
    for number, start in enumerate(starts[:-1], start=1):
        if differing := sorted(names ^ set(start.names)):
            problems.append(f"start {number} trained others than the last: {listed(differing)}")
    if newest is not None:
        if missing := sorted(names - newest.tensors.keys()):
            problems.append(f"{newest.place} lacks {listed(missing)}")
        elif (count := sum(newest.tensors[name].numel() for name in names)) != last.parameters:
            problems.append(f"{newest.place} holds {count:,} numbers in them")
    if not problems:
        return Finding(topic=topic, status="ok", text=text, figures=values)
    advice = "the settings or the code changed in the middle of the run; start it anew in another output"
    return Finding(topic=topic, status="problem", text=f"{text}; {'; '.join(problems)}", advice=advice, figures=values)


def unmoved(starts: Sequence[Trainables], own: Sequence[Weights]) -> Finding:
    """Trainables that are the same in the oldest and in the newest checkpoint.

    Args:
        starts: As for `trainables`.
        own: The run's checkpoints, the oldest first.
    """
    topic = "trainables that moved"
    if not starts:
        return not_recorded(topic, "neither starts.jsonl nor summary.json names the trainables")
    if len(own) < 2:
        return Finding(topic=topic, status="unknown", text="there is only one checkpoint to look at")
    oldest, newest = own[0], own[-1]
    names = [name for name in starts[-1].names if name in oldest.tensors and name in newest.tensors]
    still = sorted(set(names) - set(changed_tensors(oldest.tensors, newest.tensors, names)))
    between = f"between {oldest.place} and {newest.place}"
    if not still:
        return Finding(topic=topic, status="ok", text=f"all {len(names)} moved {between}")
    all_still = len(still) == len(names)
    return Finding(
        topic=topic,
        status="problem" if all_still else "warning",
        text=f"{len(still)} of {len(names)} did not move {between}: {listed(still)}",
        advice="see bad_steps.jsonl and optim.learning_rate" if all_still else "a loss term of weight 0 explains some",
        figures={"unmoved": still},
    )


def frozen_tensors(starts: Sequence[Trainables], weights: Sequence[Weights]) -> Finding:
    """Whether tensors of the bridge that are not trained are the same wherever they are saved.

    Args:
        starts: As for `trainables`.
        weights: The checkpoint that the run started from, if any, and then its own, the oldest first.
    """
    topic = "frozen tensors"
    if not starts:
        return not_recorded(topic, "neither starts.jsonl nor summary.json names the trainables")
    if not weights or not weights[-1].is_own:
        return Finding(topic=topic, status="unknown", text="there is no checkpoint to look at")
    newest = weights[-1]
    names = sorted(newest.tensors.keys() - {name for start in starts for name in start.names})
    if not names:
        return Finding(topic=topic, status="ok", text="every tensor of the bridge is trained")
    if len(weights) < 2:
        text = f"{len(names)} tensors are not trained; one checkpoint alone does not tell whether they moved"
        return Finding(topic=topic, status="unknown", text=text)
    found = {one.place: changed_tensors(one.tensors, newest.tensors, names) for one in weights[:-1]}
    found = {place: changed for place, changed in found.items() if changed}
    others = ", ".join(one.place for one in weights[:-1])
    if not found:
        text = f"{len(names)} tensors are not trained, and {newest.place} has them as {others} has"
        return Finding(topic=topic, status="ok", text=text, figures={"frozen": len(names), "moved": {}})
    told = "; ".join(f"since {place}: {listed(changed)}" for place, changed in found.items())
    if all(not one.is_own for one in weights if one.place in found):
        told += " (unless that checkpoint was changed after this run began)"
    return Finding(
        topic=topic,
        status="problem",
        text=f"frozen layers moved, up to {newest.place}, {told}",
        advice="do not use these checkpoints: something changed weights that are not trained; train again",
        figures={"frozen": len(names), "moved": found},
    )


def backbones(recorded: Sequence[Mapping[str, str]], now: Mapping[str, Sequence[str] | str]) -> list[Finding]:
    """Whether frozen models are the ones that training began with.

    Args:
        recorded: SHA-256 of each frozen model, by its name, at each start.
        now: Of each frozen model the SHA-256 that it has now, one for each dtype that it may have been loaded in, the
            likeliest first; or, as a text, why it could not be loaded.
    """
    if not recorded:
        return [not_recorded("frozen models", "no frozen_sha256 in starts.jsonl or summary.json")]
    return [_backbone(name, [one[name] for one in recorded if name in one], now) for name in sorted(recorded[-1])]


def finite(newest: Weights) -> Finding:
    """Whether a checkpoint's weights are numbers."""
    bad = sorted(name for name, tensor in newest.tensors.items() if not bool(tensor.isfinite().all()))
    if not bad:
        return Finding(topic="weights", status="ok", text=f"every tensor of {newest.place} is finite")
    text = f"{newest.place} holds NaN or infinity in {len(bad)} tensors: {listed(bad)}"
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
