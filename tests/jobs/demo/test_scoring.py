import random

import pytest

from jobs.demo.scoring import is_right, score_captions
from jobs.demo.world.grammar import captions
from jobs.demo.world.scenes import Scene, Thing, sample_scene

SCENES = [sample_scene(random.Random(f"{kind}{i}"), kind, True) for i in range(60) for kind in ("image",)]
CLIPS = [sample_scene(random.Random(f"clip{i}"), "clip", True) for i in range(60)]


def told(scenes):
    return [captions(scene, random.Random(i), 1)[0] for i, scene in enumerate(scenes)]


@pytest.mark.parametrize("scenes", [SCENES, CLIPS])
def test_faultless_captions_score_one_and_fall_to_chance_when_shuffled(scenes):
    scores = score_captions(scenes, told(scenes))
    assert set(scores.attributes.values()) == {1.0} and scores.whole == 1.0
    assert scores.shuffled == scores.chance
    assert scores.chance["colour"] < 0.4


def test_captions_that_do_not_parse_score_zero():
    scores = score_captions(SCENES, ["a red"] * len(SCENES))
    assert set(scores.attributes.values()) == {0.0} and scores.whole == 0.0


def test_a_model_that_ignores_the_image_scores_the_same_shuffled():
    """The bar on shuffled images alone proves nothing: it must be read beside the accuracy."""
    scores = score_captions(CLIPS, [told(CLIPS)[0]] * len(CLIPS))
    for name, value in scores.attributes.items():
        assert value == pytest.approx(scores.shuffled[name])


def test_the_mirrored_telling_of_a_relation_is_right():
    red, blue = Thing("small", "red", "circle"), Thing("large", "blue", "square")
    scene = Scene((red, blue), relation="left of")
    caption = captions(scene.mirrored(), random.Random(0), 1)[0]
    assert is_right(scene, caption)
    assert not is_right(Scene((blue, red), relation="left of"), caption)
