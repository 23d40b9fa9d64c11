"""The video demo's world: captions tell the truth, order alone decides, sound is where and what it should be."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from jobs.demo.make_backbones import MODELS_FOLDER
from jobs.demo.video.backbones.language import caption_accuracy
from jobs.demo.video.world.corpus import read_broken, read_scenes, write_clip_world
from jobs.demo.video.world.grammar import captions, parse, vocabulary
from jobs.demo.video.world.render import DURATION_S, NUM_FRAMES, render_clip
from jobs.demo.video.world.scenes import (
    ACTIONS,
    CHANGE,
    EVENTS,
    KIND_SHARES,
    KINDS,
    MOVES,
    PITCHES,
    SEQUENCE,
    SIDES,
    ClipScene,
    Tone,
    draw_scenes,
)  # fmt: skip
from jobs.demo.video.world.sound import HZ_OF_PITCH, START_OF_SIDE
from jobs.demo.world.scenes import HELD_OUT, Thing
from pipelines.data.media.clip import WaveformRequest
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.media.video.waveform import read_waveform
from qformer.backbones import load_language
from qformer.config import LanguageSpec
from qformer.preprocessing import Preprocessing

RED, BLUE = Thing("small", "red", "square"), Thing("large", "blue", "star")
SAMPLE_RATE_HZ = 16_000
LOUD = 0.08
"""Above the noise, below every tone."""
CODEC_DELAY_S = 0.08
"""AAC smears a tone's begin over its windows of 1,024 samples."""


def without_size(scene: ClipScene) -> ClipScene:
    return replace(scene, things=tuple(replace(thing, size="small") for thing in scene.things))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip_world(folder, num_clips=40, num_test_clips=40, seed=3, broken_share=0.1)
    return folder


@pytest.fixture(scope="module")
def decoder():
    half = (0.5, 0.5, 0.5)
    square = Preprocessing(height=64, width=64, resize_short_side=64, interpolation="bicubic", mean=half, std=half)
    decoder = SampleDecoder(DecodeSettings(preprocessing=square, num_frames=NUM_FRAMES))
    yield decoder
    decoder.close()


def rows_of(world: Path) -> list[dict]:
    return [json.loads(line) for line in (world / "manifest.jsonl").read_text().splitlines()]


def pixels_of(decoder: SampleDecoder, path: Path) -> np.ndarray:
    return decoder.decode(kind="video", media=str(path)).pixels


def shown(decoder: SampleDecoder, tmp_path: Path, scene: ClipScene, seed: str = "0") -> np.ndarray:
    render_clip(scene, seed).write(tmp_path / "clip.mp4")
    return pixels_of(decoder, tmp_path / "clip.mp4")


def test_every_caption_of_every_story_parses_back():
    words = set(vocabulary())
    for held_out in (False, True):
        for scene in draw_scenes(random.Random(0), 300, held_out=held_out):
            told = captions(scene)
            assert len(set(told)) == len(told) == 2
            for caption in told:
                assert parse(caption) == without_size(scene)
                assert set(caption.split()) <= words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red square moves",  # nowhere
        "a red square moves left after a low tone",  # only events have one
        "a red square appears after a tone",
        "a red square appears after a low tone ",
        "first a red square comes",  # then what?
        "a red square turns into a blue",
        "the clip shows a red square moves left",
    ],
)
def test_near_misses_do_not_parse(text: str):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("moves left", (RED, BLUE)), "2 things"),
        ((CHANGE, (RED,)), "1 things"),
        (("flies", (RED,)), "flies"),
        ((SEQUENCE, (RED, BLUE), Tone("low", "before")), "only events"),
    ],
)
def test_stories_that_cannot_be(values: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        ClipScene(*values)


def test_a_tone_before_the_event_is_told_as_the_event_after_the_tone():
    told = captions(ClipScene("appears", (RED,), Tone("low", "before")))
    assert told[0] == "a red square appears after a low tone"


@pytest.mark.parametrize("held_out", [False, True])
def test_stories_are_balanced(held_out: bool):
    scenes = draw_scenes(random.Random(1), 400, held_out=held_out)
    for kind, share in KIND_SHARES.items():
        counts = Counter(scene.action for scene in scenes if scene.kind == kind)
        assert counts.total() == 40 * share
        assert set(counts.values()) == {40 * share // len(KINDS[kind])}
    tones = Counter(scene.tone for scene in scenes if scene.action in EVENTS)
    assert tones.pop(None) == 30
    assert set(tones.values()) == {15} and len(tones) == len(PITCHES) * len(SIDES)
    # Which of two things comes first has no leaning either: as often one of the two as the other, about.
    first = Counter(scene.things[0].pair < scene.things[1].pair for scene in scenes if len(scene.things) == 2)
    assert 0.4 < first[True] / first.total() < 0.6


@pytest.mark.parametrize("scene", [ClipScene(a, (RED, BLUE)[: 1 + (a in (SEQUENCE, CHANGE))]) for a in ACTIONS])
def test_a_story_reversed_is_the_same_frames_backwards_to_the_last_bit(decoder, tmp_path, scene: ClipScene):
    """So that a bag of frames says nothing of the order, not even by how well each frame is compressed."""
    for seed in range(3):
        there = shown(decoder, tmp_path, scene, str(seed))
        back = shown(decoder, tmp_path, scene.reversed(), str(seed))
        assert np.array_equal(there[::-1], back)
        assert not np.array_equal(there, back)


def test_what_is_seen_is_what_is_told(decoder, tmp_path):
    """Read off the pixels: where the thing is that stands out from the ground, and its colour."""

    def centre_and_colour(picture: np.ndarray) -> tuple[float, float, tuple[bool, bool]] | None:
        lively = picture.max(0).astype(int) - picture.min(0) > 60
        if lively.sum() < 20:
            return None
        y, x = np.nonzero(lively)
        red, _, blue = (np.median(channel[lively]) for channel in picture)
        return x.mean(), y.mean(), (red > 150, blue > 150)

    red, blue = (True, False), (False, True)
    for seed in ("0", "1", "2"):
        for action in MOVES:
            seen = [centre_and_colour(p) for p in shown(decoder, tmp_path, ClipScene(action, (RED,)), seed)]
            (x0, y0, _), (x1, y1, _) = seen[1], seen[-2]
            way = {"moves left": x0 - x1, "moves right": x1 - x0, "moves up": y0 - y1, "moves down": y1 - y0}
            assert max(way, key=way.get) == action
        for action, order in (("appears", slice(None)), ("disappears", slice(None, None, -1))):
            seen = [centre_and_colour(p) for p in shown(decoder, tmp_path, ClipScene(action, (RED,)), seed)[order]]
            assert seen[0] is None and seen[-1] is not None
        for action in (SEQUENCE, CHANGE):
            seen = [centre_and_colour(p) for p in shown(decoder, tmp_path, ClipScene(action, (RED, BLUE)), seed)]
            colours = [look[2] for look in seen if look is not None]
            assert colours == sorted(colours, key=(red, blue).index) and set(colours) == {red, blue}
            assert (None in seen[2:-2]) == (action == SEQUENCE)


@pytest.mark.parametrize("pitch", PITCHES)
@pytest.mark.parametrize("side", SIDES)
def test_the_tone_in_the_file_has_its_pitch_and_its_time(tmp_path, pitch: str, side: str):
    for seed in ("0", "1", "2"):
        render_clip(ClipScene("appears", (RED,), Tone(pitch, side)), seed).write(tmp_path / "clip.mp4")
        request = WaveformRequest(sample_rate_hz=SAMPLE_RATE_HZ)
        wave = read_waveform(str(tmp_path / "clip.mp4"), request, 10**7)
        spectrum = np.abs(np.fft.rfft(wave))
        strongest_hz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE_HZ)[spectrum.argmax()]
        low_hz, high_hz = HZ_OF_PITCH[pitch]
        assert 0.97 * low_hz <= strongest_hz <= 1.03 * high_hz
        loud = np.nonzero(np.abs(wave) > LOUD)[0] / SAMPLE_RATE_HZ
        low_s, high_s = (share * DURATION_S for share in START_OF_SIDE[side])
        assert low_s - CODEC_DELAY_S <= loud[0] <= high_s + CODEC_DELAY_S
        # Away from every moment at which an event may happen.
        assert loud[-1] < 0.4 * DURATION_S or loud[0] > 0.6 * DURATION_S


def test_only_what_has_a_tone_has_an_audio_track(world: Path):
    scenes, broken = read_scenes(world), read_broken(world)
    for row in rows_of(world):
        if row["sample_id"] in broken:
            continue
        with av.open(str(world / row["media"])) as container:
            assert bool(container.streams.audio) == (scenes[row["sample_id"]].tone is not None)


def test_manifest_truth_and_files_agree(world: Path, decoder):
    scenes, broken = read_scenes(world), read_broken(world)
    rows = rows_of(world)
    assert [row["sample_id"] for row in rows] == list(scenes) and len(rows) == 80
    for row in rows:
        scene = scenes[row["sample_id"]]
        assert [parse(caption) for caption in row["captions"]] == [without_size(scene)] * 2
        pairs = {thing.pair for thing in scene.things}
        assert pairs <= set(HELD_OUT) if row["split"] == "test" else not pairs & set(HELD_OUT)
    assert len(broken) == 4 and all(name.startswith("clip-train") for name in broken)


def test_every_test_clip_is_there_both_ways(world: Path, decoder):
    scenes = read_scenes(world)
    forwards = [name for name in scenes if name.startswith("clip-test") and not name.endswith("-reversed")]
    assert len(forwards) == 20
    for name in forwards:
        assert scenes[f"{name}-reversed"] == scenes[name].reversed()
        there, back = (pixels_of(decoder, world / f"clips/{name}{end}.mp4") for end in ("", "-reversed"))
        assert np.array_equal(there[::-1], back)


def test_exactly_the_listed_files_are_broken(world: Path, decoder):
    failed = set()
    for row in rows_of(world):
        try:
            pixels_of(decoder, world / row["media"])
        except Exception:
            failed.add(row["sample_id"])
    assert failed == read_broken(world)


def test_the_seed_decides_every_byte(tmp_path: Path):
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        write_clip_world(tmp_path / name, num_clips=8, num_test_clips=4, seed=seed, broken_share=0.2)

    def content(name: str) -> dict[str, bytes]:
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    assert content("one") == content("same")
    assert content("one")["manifest.jsonl"] != content("other")["manifest.jsonl"]


def test_an_odd_number_of_test_clips_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="num_test_clips=3"):
        write_clip_world(tmp_path, num_clips=2, num_test_clips=3, seed=0, broken_share=0)


def test_the_clip_language_model_loads_and_tells_held_out_stories():
    model, tokenizer = load_language(LanguageSpec(str(MODELS_FOLDER / "clip_language")))
    assert tokenizer.unk_token_id not in tokenizer(" ".join(vocabulary())).input_ids
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert caption_accuracy(model, tokenizer, noise_std=0.0, count=50) >= 0.95
