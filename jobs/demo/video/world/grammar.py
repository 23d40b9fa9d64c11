"""The video demo's closed grammar: every story has two captions, every caption tells one story but for sizes."""

import functools
import random
import re

from jobs.demo.video.world.scenes import CHANGE, EVENTS, MOVES, PITCHES, SEQUENCE, SIDES, ClipScene, Tone
from jobs.demo.world.scenes import COLOURS, SHAPES, SIZES, Thing

OPENINGS = ("", "the clip shows how ")
_A, _B = "a {a_colour} {a_shape}", "a {b_colour} {b_shape}"
_TEMPLATES = (
    f"{_A} {{move}}",
    f"{_A} {{event}}",
    f"{_A} {{event}} {{relation}} a {{pitch}} tone",
    f"first {_A} comes {{then}} {_B}",
    f"{_A} {CHANGE} {_B}",
)
_WORDS_OF_FIELD = {
    "a_colour": COLOURS, "a_shape": SHAPES, "b_colour": COLOURS, "b_shape": SHAPES,
    "move": MOVES, "event": EVENTS, "relation": SIDES, "pitch": PITCHES, "then": (SEQUENCE,),
}  # fmt: skip
_OPPOSITE = dict(zip(SIDES, reversed(SIDES), strict=True))
"""A tone before an event: the event comes after the tone."""


def captions(story: ClipScene) -> list[str]:
    """Return every caption of a story: lower case, no punctuation, no sizes."""
    fields = {"move": story.action, "event": story.action, "then": SEQUENCE}
    for name, thing in zip("ab", story.things, strict=False):
        fields |= {f"{name}_colour": thing.colour, f"{name}_shape": thing.shape}
    if story.tone is not None:
        fields |= {"relation": _OPPOSITE[story.tone.side], "pitch": story.tone.pitch}
    template = _TEMPLATES[_template_of(story)].format(**fields)
    return [opening + template for opening in OPENINGS]


def parse(text: str) -> ClipScene | None:
    """Return the story that a caption tells, all things of the first size, or None if it is not in the grammar."""
    for pattern in _patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            return _scene(match.groupdict())
    return None


def vocabulary() -> list[str]:
    """Return every word of the grammar, sorted."""
    fixed = re.sub(r"\{\w+\}", " ", " ".join((*OPENINGS, *_TEMPLATES))).split()
    values = " ".join(value for values in _WORDS_OF_FIELD.values() for value in values).split()
    return sorted({*fixed, *values})


def paraphrase(story: ClipScene, rng: random.Random) -> str:
    """Return one caption by chance."""
    return rng.choice(captions(story))


def _template_of(story: ClipScene) -> int:
    if story.action in MOVES:
        return 0
    if story.action in EVENTS:
        return 1 if story.tone is None else 2
    return 3 if story.action == SEQUENCE else 4


def _scene(fields: dict[str, str]) -> ClipScene:
    things = tuple(
        Thing(SIZES[0], fields[f"{name}_colour"], fields[f"{name}_shape"])
        for name in "ab"
        if f"{name}_colour" in fields
    )
    tone = Tone(fields["pitch"], _OPPOSITE[fields["relation"]]) if "pitch" in fields else None
    action = fields.get("move") or fields.get("event") or fields.get("then") or CHANGE
    return ClipScene(action, things, tone)


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    def group(field: re.Match[str]) -> str:
        return f"(?P<{field[1]}>{'|'.join(_WORDS_OF_FIELD[field[1]])})"

    opening = f"(?:{'|'.join(OPENINGS)})"
    return tuple(re.compile(opening + re.sub(r"\{(\w+)\}", group, template)) for template in _TEMPLATES)
