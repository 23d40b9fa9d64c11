"""The demo's table: every bar it prints is one that can be missed."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.demo.results import exit_code, measure
from jobs.demo.world.grammar import captions
from jobs.demo.world.scenes import sample_scene

SCENES = {
    f"{name}-{index}": sample_scene(random.Random(f"{name}{index}"), name, True)
    for name in ("image", "clip")
    for index in range(80)
}
BROKEN = ["image-train-1", "clip-train-2"]


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_output(folder, *, said=lambda text: text, recall=1.0, quarantined=BROKEN, served=lambda text: text):
    """What a demo leaves behind that measured exactly this."""
    told = {name: said(captions(scene, random.Random(name), 1)[0]) for name, scene in SCENES.items()}
    write_json(
        folder / "world/truth.json", {"broken": BROKEN, "scenes": {name: s.to_dict() for name, s in SCENES.items()}}
    )
    kinds = ["image" if name.startswith("image") else "video" for name in told]
    predictions = pa.table({"sample_id": list(told), "kind": kinds, "prediction": list(told.values())})
    (folder / "captions").mkdir()
    pq.write_table(predictions, folder / "captions/predictions.parquet")
    both = {"images": 80, "image_to_text": {"r1": recall}, "text_to_image": {"r1": recall}}
    write_json(folder / "retrieval/retrieval.json", {"kinds": {"image": both, "video": both}})
    (folder / "data").mkdir()
    pq.write_table(pa.table({"sample_id": pa.array(quarantined, pa.string())}), folder / "data/quarantine.parquet")
    answers = [{"offline": text, "served": served(text)} for text in list(told.values())[:3]]
    write_json(folder / "served/answers.json", answers)
    return folder


def missed(folder, **changes):
    table = measure(write_output(folder, **changes), min_whole_caption=0.8)
    names = [row.name for row in table if row.ok is False]
    assert exit_code(table) == bool(names)
    return names


def test_a_faultless_run_misses_nothing(tmp_path):
    assert missed(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recall": 0.59}, ["images: image to text R@1, 80 pairs", "images: text to image R@1, 80 pairs"]),
        ({"quarantined": BROKEN[:1]}, ["quarantined files"]),
        ({"quarantined": [*BROKEN, "image-train-3"]}, ["quarantined files"]),
        ({"served": lambda text: text + "!"}, ["served caption = offline caption"]),
    ],
)
def test_a_missed_bar_is_named_and_fails_the_run(tmp_path, changes, expected):
    assert missed(tmp_path, **changes) == expected


def test_one_caption_for_all_misses_attributes_and_whole_captions(tmp_path):
    names = missed(tmp_path, said=lambda text: "a small red circle moving sideways")
    assert {"images: colour", "clips: motion", "images: whole caption (80)", "clips: whole caption (80)"} <= set(names)
