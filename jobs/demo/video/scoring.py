"""How right captions of clips are, and the best that can be guessed without order, or without sound."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from jobs.demo.video.world.grammar import captions, parse
from jobs.demo.video.world.scenes import KINDS, MOVES, ClipScene

ORDER = tuple(KINDS)
"""Attributes that need the order of the frames."""
SOUND = ("pitch", "side")
"""Attributes that need the sound: how high a tone is, and whether it starts before or after the event."""
THINGS = "things"
"""Which things were there, whatever their order: what an observer without order can tell too."""


def score(truths: Sequence[ClipScene], said: Sequence[str]) -> dict[str, float]:
    """Share of right answers by attribute, over the clips that have it; what does not parse is wrong in everything.

    Args:
        truths: The stories that were shown.
        said: Caption of each.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    for truth, caption in zip(truths, said, strict=True):
        for name, is_right in judge(truth, caption).items():
            found[name].append(is_right)
    return {name: sum(values) / len(values) for name, values in found.items()}


def judge(truth: ClipScene, caption: str) -> dict[str, bool]:
    """Right or wrong for each attribute that a story has."""
    wanted, guess = values_of(truth), parse(caption)
    if guess is None:
        return dict.fromkeys(wanted, False)
    # Whether one thing became the other or only followed it, is not what the attribute of order asks.
    told = {**values_of(guess), truth.kind: _order_of(guess)}
    return {name: told.get(name) == value for name, value in wanted.items()}


def choices(truth: ClipScene) -> list[str]:
    """A caption for every value of a story's attribute of order; the truth supplies the rest.

    They are the same, in the same order, for a clip and its reversal: whoever finds them all equally likely, or always
    likes one of the two best, is right for exactly one of the pair. All are equally long.
    """
    told = [replace(truth, action=move) for move in MOVES] if truth.action in MOVES else [truth, truth.reversed()]
    return sorted(captions(story)[0] for story in told)


def values_of(story: ClipScene) -> dict[str, Hashable]:
    """A story's attributes and their values."""
    values: dict[str, Hashable] = {
        story.kind: _order_of(story),
        THINGS: frozenset(thing.pair for thing in story.things),
    }
    if story.tone is not None:
        values |= {"pitch": story.tone.pitch, "side": story.tone.side}
    return values


def best_guess_without(truths: Sequence[ClipScene], seen: Sequence[Hashable]) -> dict[str, float]:
    """The highest share of right answers that any observer can reach on these very clips.

    Clips of which it sees the same must get the same answer: at best the most frequent true one.

    Args:
        truths: The stories.
        seen: What the observer sees of each, e.g. its frames without their order.

    Returns:
        By attribute, over the clips that have it.
    """
    by_view: dict[str, dict[Hashable, Counter[Hashable]]] = defaultdict(lambda: defaultdict(Counter))
    for truth, view in zip(truths, seen, strict=True):
        for name, value in values_of(truth).items():
            by_view[name][view][value] += 1
    return {
        name: sum(max(counts.values()) for counts in views.values()) / sum(c.total() for c in views.values())
        for name, views in by_view.items()
    }


def _order_of(story: ClipScene) -> str:
    """What only the order tells: which way, or which of two things was first, by its colour (theirs always differ)."""
    return story.action if len(story.things) == 1 else story.things[0].colour
