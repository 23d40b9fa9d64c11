"""The video demo's closed grammar: each scene has two captions, each caption describes one scene except for sizes."""

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
"""Relation in a caption, by side of the tone: if the tone is before the event, the event is after the tone."""


def captions(scene: ClipScene) -> list[str]:
    """Return every caption of a scene: lower case, no punctuation, no sizes."""
    fields = {"move": scene.action, "event": scene.action, "then": SEQUENCE}
    for name, thing in zip("ab", scene.things, strict=False):
        fields |= {f"{name}_colour": thing.colour, f"{name}_shape": thing.shape}
    if scene.tone is not None:
        fields |= {"relation": _OPPOSITE[scene.tone.side], "pitch": scene.tone.pitch}
    template = _TEMPLATES[_template_of(scene)].format(**fields)
    return [opening + template for opening in OPENINGS]


def parse(text: str) -> ClipScene | None:
    """Return the scene of a caption, with the first size for all things; None if the caption is not in the grammar."""
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


def paraphrase(scene: ClipScene, rng: random.Random) -> str:
    """Return a random caption."""
    return rng.choice(captions(scene))


def _template_of(scene: ClipScene) -> int:
    if scene.action in MOVES:
        return 0
    if scene.action in EVENTS:
        return 1 if scene.tone is None else 2
    return 3 if scene.action == SEQUENCE else 4


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
