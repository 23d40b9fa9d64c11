"""Accuracy of captions of clips, and the best possible guess without the order of frames, or without sound."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from jobs.demo.video.world.grammar import captions, parse
from jobs.demo.video.world.scenes import KINDS, MOVES, ClipScene

ORDER = tuple(KINDS)
"""Attributes that need the order of the frames."""
SOUND = ("pitch", "side")
"""Attributes that need the sound: the pitch of the tone, and whether it starts before or after the event."""
THINGS = "things"
"""Attribute of the things in a clip, whatever their order; it needs no order of frames."""


def score(truths: Sequence[ClipScene], predictions: Sequence[str]) -> dict[str, float]:
    """Accuracy by attribute, over the clips that have it; a caption that does not parse is wrong in everything.

    Args:
        truths: Scenes of the clips.
        predictions: Captions of the clips.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    for truth, caption in zip(truths, predictions, strict=True):
        for name, is_right in judge(truth, caption).items():
            found[name].append(is_right)
    return {name: sum(values) / len(values) for name, values in found.items()}


def judge(truth: ClipScene, caption: str) -> dict[str, bool]:
    """Right or wrong, for each attribute of the scene."""
    wanted, guess = values_of(truth), parse(caption)
    if guess is None:
        return dict.fromkeys(wanted, False)
    # The attribute of order does not distinguish whether one thing turned into the other or only followed it.
    guessed = {**values_of(guess), truth.kind: _order_of(guess)}
    return {name: guessed.get(name) == value for name, value in wanted.items()}


def choices(truth: ClipScene) -> list[str]:
    """Captions for all values of a scene's attribute of order; the rest is true.

    A clip and its reversal have the same list, so a constant preference is right for exactly one of the two. All
    captions have the same length.
    """
    candidates = [replace(truth, action=move) for move in MOVES] if truth.action in MOVES else [truth, truth.reversed()]
    return sorted(captions(scene)[0] for scene in candidates)


def values_of(scene: ClipScene) -> dict[str, Hashable]:
    """Attributes of a scene with their values."""
    values: dict[str, Hashable] = {
        scene.kind: _order_of(scene),
        THINGS: frozenset(thing.pair for thing in scene.things),
    }
    if scene.tone is not None:
        values |= {"pitch": scene.tone.pitch, "side": scene.tone.side}
    return values


def best_guess_without(truths: Sequence[ClipScene], views: Sequence[Hashable]) -> dict[str, float]:
    """Highest accuracy that any predictor can reach on these clips with a limited view of them.

    Clips with equal views must get equal answers: at best the most frequent true one.

    Args:
        truths: Scenes of the clips.
        views: Visible part of each clip, e.g. its frames without their order.

    Returns:
        Accuracy by attribute, over the clips that have it.
    """
    by_view: dict[str, dict[Hashable, Counter[Hashable]]] = defaultdict(lambda: defaultdict(Counter))
    for truth, view in zip(truths, views, strict=True):
        for name, value in values_of(truth).items():
            by_view[name][view][value] += 1
    return {
        name: sum(max(counts.values()) for counts in groups.values()) / sum(c.total() for c in groups.values())
        for name, groups in by_view.items()
    }


def _order_of(scene: ClipScene) -> str:
    """Value that needs the order: the direction, or the colour of the first of two things (colours always differ)."""
    return scene.action if len(scene.things) == 1 else scene.things[0].colour
