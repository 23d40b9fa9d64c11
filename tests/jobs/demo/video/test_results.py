"""The video demo's table and report: every bar it prints can be missed; strips show frames, sound and all answers."""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.demo.results import exit_code
from jobs.demo.video.answers import AS_IT_IS, FRAMES_SHUFFLED, SOUND_SHUFFLED, decode_clips, likeliest
from jobs.demo.video.backbones.audio import NUM_SEGMENTS
from jobs.demo.video.backbones.facts import scene_facts
from jobs.demo.video.bridges import BRIDGES, MODELS
from jobs.demo.video.results import measure, write
from jobs.demo.video.scoring import ORDER, choices
from jobs.demo.video.world.corpus import read_broken, read_scenes, write_clip_world
from jobs.demo.video.world.grammar import captions
from jobs.demo.video.world.scenes import Tone, draw_scenes
from jobs.demo.video.world.sound import waveform_of
from jobs.demo.video.world.spectrogram import spectrogram_picture
from qformer.backbones import load_language
from qformer.config import LanguageSpec
from qformer.language import build_language_model
from qformer.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)
SQUARE = Preprocessing(height=64, width=64, resize_short_side=64, interpolation="bicubic", mean=HALF, std=HALF)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a world, a manifest of its good clips and the quarantine of the others."""
    folder = tmp_path_factory.mktemp("demo")
    write_clip_world(folder / "clip_world", num_clips=8, num_test_clips=80, seed=0, broken_share=0.2)
    rows = [json.loads(line) for line in (folder / "clip_world/manifest.jsonl").read_text().splitlines()]
    broken = read_broken(folder / "clip_world")
    good = [
        {**row, "media": str(folder / "clip_world" / row["media"])} for row in rows if row["sample_id"] not in broken
    ]
    (folder / "clip_data").mkdir()
    pq.write_table(pa.Table.from_pylist(good), folder / "clip_data/manifest.parquet")
    pq.write_table(pa.table({"sample_id": sorted(broken)}), folder / "clip_data/quarantine.parquet")
    for bridge in BRIDGES:
        (folder / bridge.name).mkdir()
        lines = [json.dumps({"step": step, "loss/lm": 1 / step}) for step in (10, 20)]
        (folder / bridge.name / "metrics.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def clips(demo):
    return decode_clips(demo / "clip_data/manifest.parquet", SQUARE)


def faultless(scenes, clips):
    return {sample_id: captions(scenes[sample_id])[0] for sample_id in clips.sample_ids}


def without_order(scenes, clips):
    """Of a clip and its reversal the same is said: right for one of them."""
    return {name: captions(scenes[name.removesuffix("-reversed")])[0] for name in clips.sample_ids}


def without_sound(scenes, clips):
    """Right but for tones: of all of them the most frequent pitch and side is said."""
    said = faultless(scenes, clips)
    heard = [name for name in clips.sample_ids if scenes[name].tone is not None]
    pitches, sides = (Counter(getattr(scenes[name].tone, part) for name in heard) for part in ("pitch", "side"))
    tone = Tone(pitches.most_common(1)[0][0], sides.most_common(1)[0][0])
    return said | {name: captions(replace(scenes[name], tone=tone))[0] for name in heard}


def answers_of(scenes, clips):
    """What bridges that do exactly what is claimed would say."""
    said = {}
    for bridge in BRIDGES:
        if bridge.reads_sound:
            said[bridge.name] = {AS_IT_IS: [faultless(scenes, clips)], SOUND_SHUFFLED: [without_sound(scenes, clips)]}
        elif bridge.reads_order:
            said[bridge.name] = {
                AS_IT_IS: [faultless(scenes, clips)],
                FRAMES_SHUFFLED: [without_order(scenes, clips)],
            }
        else:
            said[bridge.name] = {AS_IT_IS: [without_order(scenes, clips)]}
    return said


def missed(demo, clips, change=lambda said, chosen, scenes: None, seconds=600.0):
    scenes = read_scenes(demo / "clip_world")
    said, chosen = answers_of(scenes, clips), answers_of(scenes, clips)
    change(said, chosen, scenes)
    (demo / "clip_answers").mkdir(exist_ok=True)
    (demo / "clip_answers/answers.json").write_text(json.dumps(said))
    (demo / "clip_answers/choices.json").write_text(json.dumps(chosen))
    table = measure(demo, clips, seconds)
    names = [row.name for row in table if row.ok is False]
    assert exit_code(table) == bool(names)
    return names


def test_bridges_that_do_what_is_claimed_miss_nothing(demo, clips):
    assert missed(demo, clips) == []


def test_order_that_is_not_told_or_not_known_is_missed(demo, clips):
    def change(said, chosen, scenes):
        said["clip_cascaded"][AS_IT_IS] = [without_order(scenes, clips)]
        chosen["clip_spatio_temporal"][AS_IT_IS] = [without_order(scenes, clips)]

    assert missed(demo, clips, change) == [
        *(f"cascaded: {name}" for name in ORDER),
        *(f"spatio-temporal: {name}, chosen" for name in ORDER),
    ]


def test_order_known_of_shuffled_frames_or_by_the_mean_is_missed(demo, clips):
    """What must not be known is known: the bag of frames would give the order away."""

    def change(said, chosen, scenes):
        chosen["clip_spatio_temporal"][FRAMES_SHUFFLED] = [faultless(scenes, clips)]
        chosen["clip_mean"][AS_IT_IS] = [faultless(scenes, clips)]

    assert missed(demo, clips, change) == [
        *(f"mean pooling: {name}, chosen" for name in ORDER),
        *(f"spatio-temporal: {name}, chosen, frames shuffled" for name in ORDER),
    ]


def test_order_that_is_always_taken_the_other_way_round_is_missed(demo, clips):
    """It is known as well as if it were right."""

    def change(said, chosen, scenes):
        wrong = {name: captions(scenes[name].reversed())[0] for name in clips.sample_ids}
        chosen["clip_mean"][AS_IT_IS] = [wrong]

    assert missed(demo, clips, change) == [f"mean pooling: {name}, chosen" for name in ORDER]


def test_captions_of_shuffled_frames_may_be_wrong_in_all_ways(demo, clips):
    """They have no bar: they fall for other reasons than ignorance of the order. The table shows them."""

    def change(said, chosen, scenes):
        said["clip_cascaded"][FRAMES_SHUFFLED] = [dict.fromkeys(clips.sample_ids, "a red")]

    assert missed(demo, clips, change) == []
    measured = {row.name: row.measured for row in measure(demo, clips, 0)}
    assert measured["cascaded: event, chosen, frames shuffled"] == "0.500 (in captions 0.000)"


def test_a_choice_for_one_way_whatever_is_shown_is_blind(demo, clips):
    def change(said, chosen, scenes):
        chosen["clip_mean"][AS_IT_IS] = [{name: choices(scenes[name])[0] for name in clips.sample_ids}]

    # Of four ways, too few lie on the axis of the first.
    assert missed(demo, clips, change) == ["mean pooling: direction, chosen"]


def test_more_than_twenty_minutes_are_missed(demo, clips):
    assert missed(demo, clips, seconds=1200) == []
    assert missed(demo, clips, seconds=1201) == ["minutes of the clips' part"]


def test_sound_that_is_not_told_or_told_of_another_clip_is_missed(demo, clips):
    def change(said, chosen, scenes):
        said["clip_cascaded_sound"][AS_IT_IS] = [without_sound(scenes, clips)]
        said["clip_spatio_temporal_sound"][SOUND_SHUFFLED] = [faultless(scenes, clips)]

    assert missed(demo, clips, change) == [
        "cascaded with sound: pitch",
        "cascaded with sound: side",
        "spatio-temporal with sound: pitch, sounds shuffled",
        "spatio-temporal with sound: side, sounds shuffled",
    ]


def test_the_table_names_the_guesses_that_it_compares_with(demo, clips):
    missed(demo, clips)
    bars = {row.name: row.bar for row in measure(demo, clips, 0)}
    assert bars["mean pooling: direction, chosen"] == "guess without order 0.500 ± 0.1"
    assert bars["cascaded: event, chosen, frames shuffled"] == "guess without order 0.500 ± 0.1"
    sides = Counter(tone.side for tone in (read_scenes(demo / "clip_world")[n].tone for n in clips.sample_ids) if tone)
    best = max(sides.values()) / sides.total()
    assert bars["cascaded with sound: side, sounds shuffled"] == f"guess without sound {best:.3f} ± 0.1"


def test_the_likeliest_caption_is_that_of_the_facts_in_the_soft_prompts():
    """The shipped language model reads facts as soft prompts, so the right choice is known."""
    model, tokenizer = load_language(LanguageSpec(str(MODELS / "clip_language")))
    language = build_language_model(model, tokenizer)
    drawn = draw_scenes(random.Random(0), 40, held_out=True)
    scenes = [way for scene in drawn for way in (scene, scene.reversed())]
    facts = [[*scene_facts(scene), *scene_facts(scene)][:6] for scene in scenes]
    prompts = [model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(own)] for own in facts]
    chosen = likeliest(language, prompts, [choices(scene) for scene in scenes], text="", max_tokens=32)
    assert chosen == [captions(scene)[0] for scene in scenes]


def test_shuffled_frames_are_the_same_bags_and_shuffled_sounds_are_all_other_clips(clips):
    seen = replace(clips, tokens=clips.pixels.float().flatten(3))
    shuffled = seen.with_frames_shuffled(random.Random(0))
    assert shuffled.unordered_frames() == clips.unordered_frames()
    assert not torch.equal(shuffled.pixels, clips.pixels)
    assert torch.equal(shuffled.tokens, shuffled.pixels.float().flatten(3))  # each frame's own
    other = clips.with_sound_shuffled(random.Random(0))
    assert torch.equal(other.audio_valid, clips.audio_valid)
    heard = clips.audio_valid.any(1)
    changed = (other.waveforms != clips.waveforms).flatten(1).any(1)
    assert torch.equal(changed, heard) and 0 < heard.sum() < len(heard)
    assert sorted(w.sum().item() for w in other.waveforms) == sorted(w.sum().item() for w in clips.waveforms)


def test_a_clip_and_its_reversal_are_one_bag(clips):
    unordered_frames = dict(zip(clips.sample_ids, clips.unordered_frames(), strict=True))
    assert len(set(unordered_frames.values())) == len(unordered_frames) // 2
    for name, bag in unordered_frames.items():
        if name.endswith("-reversed"):
            assert bag == unordered_frames[name.removesuffix("-reversed")]


def test_the_report_shows_strips_truth_and_every_answer(demo, clips):
    missed(demo, clips)
    page = write(demo, clips, measure(demo, clips, 0)).read_text()
    for bridge in BRIDGES:
        assert f"{bridge.title}: " in page
    assert "true: a " in page and "Which thing comes first" in page
    # Eight frames, and one picture of the sound where there is one.
    strips = page.split("<div class=strip>")[1:]
    assert {strip.split("</div>")[0].count("<img") for strip in strips} == {8, 9}


@pytest.mark.parametrize(("pitch", "side"), [("low", "before"), ("high", "after")])
def test_the_picture_of_a_sound_is_bright_where_the_tone_is(pitch, side):
    picture = spectrogram_picture(waveform_of(Tone(pitch, side), 2, random.Random(0)), height=128)
    bright = picture.astype(int).sum(2)
    row, column = np.unravel_index(bright.argmax(), bright.shape)
    assert picture.shape[0] == 128 and picture.shape[2] == 3
    assert (row > 64) == (pitch == "low") and (column < picture.shape[1] / 2) == (side == "before")


def test_segments_are_the_clip_without_a_rest(clips):
    assert clips.waveforms.shape[1:] == (NUM_SEGMENTS, 4000)
