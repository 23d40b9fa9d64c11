"""The demo's closed grammar: each scene has several captions, each caption describes one scene."""

import functools
import random
import re

from jobs.demo.world.scenes import COLOURS, MOTIONS, RELATIONS, SHAPES, SIZES, Scene, Thing

_A = "{a_size} {a_colour} {a_shape}"
_B = "{b_size} {b_colour} {b_shape}"
SINGLE_TEMPLATES = (
    f"a {_A}",
    f"there is a {_A}",
    f"the picture shows a {_A}",
    "a {a_colour} {a_shape} that is {a_size}",
    f"one {_A} alone",
    f"here we see a {_A}",
)
PAIR_TEMPLATES = (
    f"a {_A} {{relation}} a {_B}",
    f"a {_A} is {{relation}} a {_B}",
    f"there is a {_A} {{relation}} a {_B}",
    f"the picture shows a {_A} {{relation}} a {_B}",
    f"here we see a {_A} {{relation}} a {_B}",
    f"{{relation}} a {_B} there is a {_A}",
)
"""Each template also describes the mirrored scene, with the inverse relation."""
CLIP_TEMPLATES = (
    f"a {_A} {{motion}}",
    f"a {_A} is {{motion}}",
    f"there is a {_A} {{motion}}",
    f"the clip shows a {_A} {{motion}}",
    f"here we see a {_A} {{motion}}",
    "a {a_colour} {a_shape} that is {a_size} and {motion}",
)
_WORDS_OF_FIELD = {
    "a_size": SIZES, "a_colour": COLOURS, "a_shape": SHAPES,
    "b_size": SIZES, "b_colour": COLOURS, "b_shape": SHAPES,
    "relation": RELATIONS, "motion": MOTIONS,
}  # fmt: skip


def captions(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """Draw distinct paraphrases of a scene.

    Args:
        scene: Scene to describe.
        rng: Random number generator.
        count: Number of captions.

    Returns:
        Lower-case captions without punctuation, all different.

    Raises:
        ValueError: If the grammar has fewer paraphrases.
    """
    everything = all_captions(scene)
    if count > len(everything):
        raise ValueError(f"a scene of this kind has {len(everything)} captions, not {count}")
    return rng.sample(everything, count)


def all_captions(scene: Scene) -> list[str]:
    """Return every caption of a scene in a fixed order."""
    if scene.motion is not None:
        return [template.format(**_fields(scene)) for template in CLIP_TEMPLATES]
    if scene.relation is None:
        return [template.format(**_fields(scene)) for template in SINGLE_TEMPLATES]
    scene = scene.canonical()
    views = (scene, scene.mirrored())
    return [template.format(**_fields(view)) for view in views for template in PAIR_TEMPLATES]


def parse(text: str) -> Scene | None:
    """Return the canonical scene that a caption describes, or None if it is not in the grammar."""
    for pattern in _patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            return _scene(match.groupdict())
    return None


def vocabulary() -> list[str]:
    """Return every word of the grammar, sorted."""
    templates = " ".join((*SINGLE_TEMPLATES, *PAIR_TEMPLATES, *CLIP_TEMPLATES))
    fixed = re.sub(r"\{\w+\}", " ", templates).split()
    values = " ".join(value for values in _WORDS_OF_FIELD.values() for value in values).split()
    return sorted({*fixed, *values})


def _fields(scene: Scene) -> dict[str, str]:
    fields = {"relation": scene.relation or "", "motion": scene.motion or ""}
    for name, thing in zip("ab", scene.things, strict=False):
        fields |= {f"{name}_size": thing.size, f"{name}_colour": thing.colour, f"{name}_shape": thing.shape}
    return fields


def _scene(fields: dict[str, str]) -> Scene:
    things = tuple(
        Thing(fields[f"{name}_size"], fields[f"{name}_colour"], fields[f"{name}_shape"])
        for name in "ab"
        if f"{name}_size" in fields
    )
    return Scene(things, fields.get("relation"), fields.get("motion")).canonical()


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    def group(field: re.Match[str]) -> str:
        return f"(?P<{field[1]}>{'|'.join(_WORDS_OF_FIELD[field[1]])})"

    templates = (*SINGLE_TEMPLATES, *PAIR_TEMPLATES, *CLIP_TEMPLATES)
    return tuple(re.compile(re.sub(r"\{(\w+)\}", group, template)) for template in templates)
