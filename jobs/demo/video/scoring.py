"""How right captions of clips are, and the best that can be guessed without order, or without sound."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from jobs.demo.video.stories import KINDS, Story
from jobs.demo.video.telling import parse

ORDER = tuple(KINDS)
"""Attributes that need the order of the frames."""
SOUND = ("pitch", "side")
"""Attributes that need the sound: how high a tone is, and whether it starts before or after the event."""
THINGS = "things"
"""Which things were there, whatever their order: what an observer without order can tell too."""


def score(truths: Sequence[Story], captions: Sequence[str]) -> dict[str, float]:
    """Share of right answers by attribute, over the clips that have it; what does not parse is wrong in everything.

    Args:
        truths: The stories that were shown.
        captions: What was said of each.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    for truth, caption in zip(truths, captions, strict=True):
        for name, is_right in judge(truth, caption).items():
            found[name].append(is_right)
    return {name: sum(values) / len(values) for name, values in found.items()}


def judge(truth: Story, caption: str) -> dict[str, bool]:
    """Right or wrong for each attribute that a story has."""
    wanted, guess = values_of(truth), parse(caption)
    told: Mapping[str, Hashable] = {} if guess is None else values_of(guess)
    return {name: told.get(name) == value for name, value in wanted.items()}


def values_of(story: Story) -> dict[str, Hashable]:
    """A story's attributes and their values.

    The attribute of order of two things is the first of them.
    """
    values: dict[str, Hashable] = {THINGS: frozenset(thing.pair for thing in story.things)}
    values[story.kind] = story.action if len(story.things) == 1 else story.things[0].pair
    if story.tone is not None:
        values |= {"pitch": story.tone.pitch, "side": story.tone.side}
    return values


def best_blind_guess(truths: Sequence[Story], seen: Sequence[Hashable]) -> dict[str, float]:
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
