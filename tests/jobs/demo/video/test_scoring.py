"""Scores of clips' captions, and the best blind guess, by hand on small sets."""

import random

import pytest

from jobs.demo.video.scoring import ORDER, SOUND, THINGS, best_guess_without, choices, judge, score
from jobs.demo.video.world.grammar import captions
from jobs.demo.video.world.scenes import CHANGE, SEQUENCE, ClipScene, Tone, draw_scenes
from jobs.demo.world.scenes import Thing

RED, BLUE = Thing("small", "red", "square"), Thing("large", "blue", "star")


def told(scenes):
    return [captions(scene)[0] for scene in scenes]


def both_ways(scenes):
    """Each scene and its reversal, and what an observer without order sees of them."""
    pairs = [(one, index) for index, scene in enumerate(scenes) for one in (scene, scene.reversed())]
    return [scene for scene, _ in pairs], [index for _, index in pairs]


def test_faultless_captions_are_right_in_everything():
    scenes = draw_scenes(random.Random(0), 100, held_out=True)
    assert score(scenes, told(scenes)) == dict.fromkeys((*ORDER, *SOUND, THINGS), 1.0)


def test_reversed_captions_are_wrong_in_order_and_right_in_the_rest():
    scenes = draw_scenes(random.Random(0), 100, held_out=True)
    wanted = {**dict.fromkeys(ORDER, 0.0), **dict.fromkeys((*SOUND, THINGS), 1.0)}
    assert score(scenes, told([scene.reversed() for scene in scenes])) == wanted


@pytest.mark.parametrize(
    ("truth", "caption", "expected"),
    [
        # Another way, the same thing.
        (ClipScene("moves left", (RED,)), "a red square moves up", {"direction": False, THINGS: True}),
        # The right way, another thing.
        (ClipScene("moves left", (RED,)), "a red star moves left", {"direction": True, THINGS: False}),
        # Which was first is told by its colour.
        (
            ClipScene(SEQUENCE, (RED, BLUE)),
            "first a red star comes then a blue square",
            {"first": True, THINGS: False},
        ),
        (ClipScene(SEQUENCE, (RED, BLUE)), "first a blue star comes then a red square", {"first": False, THINGS: True}),
        (ClipScene(SEQUENCE, (RED, BLUE)), "a red square turns into a blue star", {"first": True, THINGS: True}),
        (ClipScene(CHANGE, (RED, BLUE)), "a red square appears", {"before": False, THINGS: False}),
        # A tone that is not told is wrong; the event is still right.
        (
            ClipScene("appears", (RED,), Tone("low", "before")),
            "a red square appears",
            {"event": True, THINGS: True, "pitch": False, "side": False},
        ),
        (
            ClipScene("appears", (RED,), Tone("low", "before")),
            "a red square disappears before a low tone",
            {"event": False, THINGS: True, "pitch": True, "side": False},
        ),
        # No caption of the grammar: wrong in everything.
        (ClipScene("moves left", (RED,)), "a red square", {"direction": False, THINGS: False}),
    ],
)
def test_attributes_one_by_one(truth, caption, expected):
    assert judge(truth, caption) == expected


def test_without_order_half_of_clips_that_are_there_both_ways_is_the_best():
    scenes, unordered_frames = both_ways(draw_scenes(random.Random(0), 60, held_out=True))
    best = best_guess_without(scenes, unordered_frames)
    assert {name: best[name] for name in ORDER} == dict.fromkeys(ORDER, 0.5)
    # The things, and the sound beside the frames, are in what it sees.
    assert best[THINGS] == best["pitch"] == best["side"] == 1.0


def test_the_best_guess_is_the_most_frequent_answer_of_each_view():
    ways = ["moves left", "moves left", "moves right", "moves up"]
    scenes = [ClipScene(way, (RED,)) for way in ways]
    assert best_guess_without(scenes, "aaab")["direction"] == 0.75  # left of "a", up of "b"
    assert best_guess_without(scenes, "aaaa")["direction"] == 0.5
    assert best_guess_without(scenes, "abcd")["direction"] == 1.0


def test_no_deaf_observer_beats_chance_on_balanced_sound():
    scenes = [s for s in draw_scenes(random.Random(0), 160, held_out=True) if s.tone is not None]
    best = best_guess_without(scenes, [0] * len(scenes))
    assert best["pitch"] == pytest.approx(1 / 3, abs=0.02) and best["side"] == pytest.approx(1 / 2, abs=0.02)


def test_no_answer_that_sees_only_bags_beats_the_best_guess():
    """Any assignment of one answer a bag scores at most as high."""
    scenes, unordered_frames = both_ways(draw_scenes(random.Random(1), 40, held_out=True))
    best = best_guess_without(scenes, unordered_frames)
    rng = random.Random(2)
    for _ in range(50):
        answer = {
            bag: rng.choice([s for s, b in zip(scenes, unordered_frames, strict=True) if b == bag])
            for bag in unordered_frames
        }
        scores = score(scenes, told([answer[bag] for bag in unordered_frames]))
        assert all(scores[name] <= best[name] for name in ORDER)


def test_a_choice_is_among_captions_that_differ_in_the_order_alone():
    ways = ["a red square moves down", "a red square moves left", "a red square moves right", "a red square moves up"]
    assert choices(ClipScene("moves left", (RED,))) == ways
    assert choices(ClipScene("appears", (RED,), Tone("low", "before"))) == [
        "a red square appears after a low tone",
        "a red square disappears after a low tone",
    ]
    assert choices(ClipScene(SEQUENCE, (RED, BLUE))) == [
        "first a blue star comes then a red square",
        "first a red square comes then a blue star",
    ]
    assert choices(ClipScene(CHANGE, (RED, BLUE))) == [
        "a blue star turns into a red square",
        "a red square turns into a blue star",
    ]


def test_choices_are_those_of_the_reversal_and_equally_long():
    for scene in draw_scenes(random.Random(0), 100, held_out=True):
        offered = choices(scene)
        assert offered == choices(scene.reversed())
        assert len({len(text.split()) for text in offered}) == 1
        scores = [judge(scene, text) for text in offered]
        assert sum(all(one.values()) for one in scores) == 1
        assert all({name for name, ok in one.items() if not ok} <= {scene.kind} for one in scores)
