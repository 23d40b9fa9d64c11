"""The demo's world: its grammar is exact, its training data hold nothing held out, its models load and work."""

import json
import random
from pathlib import Path

import av
import pytest
from PIL import Image

from jobs.demo.make_backbones import MODELS_FOLDER, fact_accuracy
from jobs.demo.world.corpus import write_world
from jobs.demo.world.grammar import all_captions, captions, parse, vocabulary
from jobs.demo.world.render import clip_frames, move_to, place
from jobs.demo.world.scenes import COLOURS, HELD_OUT, MOTIONS, PAIRS, SIZES, Scene, Thing, attributes, sample_scene
from qformer.backbones import load_language, load_vision
from qformer.config import LanguageSpec, VisionSpec

RED = Thing("small", "red", "square")
BLUE = Thing("large", "blue", "star")
MAX_CAPTION_WORDS = 18
MAX_MODELS_BYTES = 8_000_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_images=60, num_clips=12, num_test_images=24, num_test_clips=6, seed=5, broken_share=0.1)
    return folder


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def _truth(folder: Path) -> dict:
    return json.loads((folder / "truth.json").read_text())


def _num_pictures(path: Path) -> int:
    if path.suffix == ".jpg":
        with Image.open(path) as image:
            image.load()
        return 1
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_every_caption_of_every_sampled_scene_parses_back():
    rng, words = random.Random(0), set(vocabulary())
    for index in range(600):
        scene = sample_scene(rng, ("single", "pair", "clip")[index % 3], held_out=index % 2 == 0)
        told = all_captions(scene)
        assert len(set(told)) == len(told) >= 5
        for caption in told:
            assert parse(caption) == scene == scene.canonical()
            assert len(caption.split()) <= MAX_CAPTION_WORDS
            assert set(caption.split()) <= words


def test_captions_of_a_mirrored_scene_tell_the_same():
    scene = Scene((RED, BLUE), relation="right of")
    assert {parse(caption) for caption in captions(scene, random.Random(0), 12)} == {scene.canonical()}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small red",  # unfinished
        "a red small circle",  # wrong order
        "a small red circle ",  # trailing space
        "A small red circle",  # capital
        "a small red circle above",  # no second thing
        "a small red circle beside a large blue star",  # no such relation
        "a small red circle blinking blinking",  # one word too many
        "a small orange circle",  # no such colour
    ],
)
def test_near_misses_do_not_parse(text: str):
    assert parse(text) is None


def test_more_captions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="6 captions"):
        captions(Scene((RED,)), random.Random(0), 7)


@pytest.mark.parametrize(
    ("relation", "canonical", "is_swapped"),
    [
        ("left of", "left of", False),
        ("right of", "left of", True),
        ("above", "above", False),
        ("below", "above", True),
    ],
)
def test_canonical_form(relation: str, canonical: str, is_swapped: bool):
    things = (BLUE, RED) if is_swapped else (RED, BLUE)
    assert Scene((RED, BLUE), relation=relation).canonical() == Scene(things, relation=canonical)


def test_scene_survives_json():
    scene = Scene((RED, BLUE), relation="above")
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_attributes_score_thing_by_thing():
    truth = Scene((RED, BLUE), relation="left of")
    # The same meaning told from the other side is right in everything.
    scores = attributes(truth, truth.mirrored())
    assert scores == {
        "size": [True, True],
        "colour": [True, True],
        "shape": [True, True],
        "relation": [True],
        "motion": [],
    }
    # A guess with one thing lacks the other and the relation.
    assert attributes(truth, Scene((RED,)))["colour"] == [True, False]
    assert attributes(truth, Scene((RED,)))["relation"] == [False]
    # An unparsable guess is wrong in everything.
    assert not any(any(values) for values in attributes(truth, None).values())


def test_held_out_pairs_take_each_colour_once_and_four_shapes_or_more():
    assert [colour for colour, _ in HELD_OUT] == list(COLOURS)
    assert len({shape for _, shape in HELD_OUT}) >= 4
    assert len(PAIRS) == 40


def test_things_stand_as_the_relation_says():
    rng = random.Random(1)
    for _ in range(300):
        scene = sample_scene(rng, "pair", held_out=False)
        first, second = place(scene, rng)
        assert (first.thing, second.thing) == scene.things
        along, across = second.x - first.x, second.y - first.y
        if scene.relation == "above":
            along, across = across, along
        assert along > 1.2 * (first.radius + second.radius) > 4 * abs(across)
        assert all(p.radius < v < 1 - p.radius for p in (first, second) for v in (p.x, p.y))


@pytest.mark.parametrize("motion", MOTIONS)
def test_four_middle_frames_reveal_the_motion(motion: str):
    rng = random.Random(2)
    for _ in range(5):
        moments, _ = clip_frames(Scene((RED,), motion=motion), rng)
        seen = [moments[int((index + 0.5) / 4 * len(moments))][1] for index in range(4)]
        spans = [max(values) - min(values) for values in ([p.x for p in seen], [p.y for p in seen])]
        assert (spans[0] > 0.3) == (motion == "moving sideways")
        assert (spans[1] > 0.3) == (motion == "moving up and down")
        assert {p.is_visible for p in seen} == ({True, False} if motion == "blinking" else {True})


def test_travel_runs_either_way():
    (placed,) = place(Scene((RED,), motion="moving sideways"), random.Random(0))
    there, back = (move_to(placed, "moving sideways", 0.0, is_reversed) for is_reversed in (False, True))
    assert there.x < 0.5 < back.x


def test_training_rows_hold_no_held_out_pair_and_test_rows_always_do(world: Path):
    scenes = {name: Scene.from_dict(values) for name, values in _truth(world)["scenes"].items()}
    rows = _rows(world)
    assert len(rows) == len(scenes) == 102
    for row in rows:
        assert scenes[row["sample_id"]].is_held_out() == (row["split"] == "test")
        told = [parse(caption) for caption in row["captions"]]
        assert told == [scenes[row["sample_id"]]] * 5 and len(set(row["captions"])) == 5
        assert (row["kind"] == "video") == (scenes[row["sample_id"]].motion is not None)


def test_test_images_all_differ_in_meaning(world: Path):
    truth = _truth(world)["scenes"]
    meanings = [
        Scene.from_dict(truth[row["sample_id"]])
        for row in _rows(world)
        if (row["split"], row["kind"]) == ("test", "image")
    ]
    assert len(set(meanings)) == len(meanings) == 24


def test_exactly_the_listed_files_are_broken(world: Path):
    failed = []
    for row in _rows(world):
        try:
            assert _num_pictures(world / row["media"]) > 0
        except (OSError, av.error.FFmpegError, IndexError):
            failed.append(row)
    assert {row["sample_id"] for row in failed} == set(_truth(world)["broken"])
    assert len(failed) == round(0.1 * 102)
    assert {row["split"] for row in failed} == {"train"}
    assert {row["kind"] for row in failed} == {"image", "video"}


def test_the_seed_decides_every_byte(tmp_path: Path):
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        write_world(tmp_path / name, num_images=8, num_clips=2, num_test_images=4, num_test_clips=1, seed=seed)

    def content(name: str) -> dict[str, bytes]:
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    assert content("one") == content("same")
    assert content("one")["manifest.jsonl"] != content("other")["manifest.jsonl"]


def test_no_damage_when_none_is_wanted(tmp_path: Path):
    write_world(tmp_path, num_images=4, num_clips=1, num_test_images=1, num_test_clips=1, seed=0, broken_share=0.0)
    assert _truth(tmp_path)["broken"] == []


def test_shipped_models_are_small_and_load_in_stock_libraries():
    assert sum(p.stat().st_size for p in MODELS_FOLDER.rglob("*") if p.is_file()) <= MAX_MODELS_BYTES
    encoder = load_vision(VisionSpec(str(MODELS_FOLDER / "vision")))
    assert (encoder.preprocessing.height, encoder.preprocessing.interpolation) == (64, "bicubic")
    model, tokenizer = load_language(LanguageSpec(str(MODELS_FOLDER / "language")))
    assert tokenizer("a small red circle").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in tokenizer(" ".join(vocabulary())).input_ids
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_language_model_tells_held_out_facts(kind: str):
    model, tokenizer = load_language(LanguageSpec(str(MODELS_FOLDER / "language")))
    assert fact_accuracy(model, tokenizer, kind, noise_std=0.0, count=50) >= 0.95


def test_the_vocabulary_holds_the_sizes():
    assert set(SIZES) <= set(vocabulary())
