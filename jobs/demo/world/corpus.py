"""Write the demo's corpus: images, clips, captions, the ground truth, and some damaged files."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.demo.world.grammar import captions
from jobs.demo.world.media_writing import DAMAGES, damage, write_media
from jobs.demo.world.render import encode_jpeg, encode_mp4, render_clip_frames, render_image
from jobs.demo.world.scenes import HELD_OUT, MOTIONS, SIZES, Scene, Thing, sample_scene

NUM_CAPTIONS = 5
MIN_BROKEN_IMAGES = 2
MIN_BROKEN_CLIPS = 1
LICENCE = "CC0-1.0"


@dataclass(frozen=True, slots=True)
class Row:
    """One file of the corpus."""

    sample_id: str
    media: str
    scene: Scene
    split: str
    seed: str
    damage: str | None = None


def write_world(
    folder: Path,
    *,
    num_images: int,
    num_clips: int,
    num_test_images: int,
    num_test_clips: int,
    seed: int,
    broken_share: float = 0.01,
) -> None:
    """Write `images/`, `clips/`, `manifest.jsonl` and `truth.json`; the same seed gives the same corpus.

    Training scenes have no held-out colour-shape pair, test scenes at least one. All test images differ in meaning;
    test clips cycle through the 64 possible meanings.

    Args:
        folder: Output folder; created if absent.
        num_images: Number of training images, damaged ones included.
        num_clips: Number of training clips, damaged ones included.
        num_test_images: Number of test images.
        num_test_clips: Number of test clips.
        seed: Seed of everything.
        broken_share: Share of all rows with a damaged file; 0 for none.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "clips").mkdir(exist_ok=True)
    rng = random.Random(f"{seed}/world")
    scenes = {
        ("image", "train"): [sample_scene(rng, "image", held_out=False) for _ in range(num_images)],
        ("video", "train"): [sample_scene(rng, "clip", held_out=False) for _ in range(num_clips)],
        ("image", "test"): _distinct_test_scenes(rng, num_test_images),
        ("video", "test"): _cycled_test_scenes(rng, num_test_clips),
    }
    num_rows = sum(len(group) for group in scenes.values())
    damages = _choose_damages(rng, num_images, num_clips, round(broken_share * num_rows), broken_share > 0)
    rows = [
        _row(kind, split, index, scene, seed, damages)
        for (kind, split), group in scenes.items()
        for index, scene in enumerate(group)
    ]
    write_media(folder, rows, _write_file)
    _write_tables(folder, rows)


def _row(kind: str, split: str, index: int, scene: Scene, seed: int, damages: dict[str, str]) -> Row:
    stem = "image" if kind == "image" else "clip"
    sample_id = f"{stem}-{split}-{index:05d}"
    media = f"{stem}s/{sample_id}.{'jpg' if kind == 'image' else 'mp4'}"
    return Row(sample_id, media, scene, split, f"{seed}/{sample_id}", damages.get(sample_id))


def _distinct_test_scenes(rng: random.Random, count: int) -> list[Scene]:
    singles = [Scene((Thing(size, *pair),)) for pair in HELD_OUT for size in SIZES]
    rng.shuffle(singles)
    # A dict preserves the order of drawing; a set does not.
    distinct = dict.fromkeys(singles[: count // 4])
    while len(distinct) < count:
        distinct[sample_scene(rng, "pair", held_out=True)] = None
    scenes = list(distinct)
    rng.shuffle(scenes)
    return scenes


def _cycled_test_scenes(rng: random.Random, count: int) -> list[Scene]:
    meanings = [
        Scene((Thing(size, *pair),), motion=motion) for pair in HELD_OUT for size in SIZES for motion in MOTIONS
    ]
    rng.shuffle(meanings)
    return [meanings[index % len(meanings)] for index in range(count)]


def _choose_damages(
    rng: random.Random, num_images: int, num_clips: int, num_broken: int, is_wanted: bool
) -> dict[str, str]:
    if not is_wanted:
        return {}
    num_broken_clips = round(num_broken * num_clips / max(1, num_images + num_clips))
    num_broken_clips = min(num_clips, max(MIN_BROKEN_CLIPS, num_broken_clips))
    num_broken_images = min(num_images, max(MIN_BROKEN_IMAGES, num_broken - num_broken_clips))
    damages = {}
    for stem, total, count in (
        ("image", num_images, num_broken_images),
        ("clip", num_clips, num_broken_clips),
    ):
        for order, index in enumerate(rng.sample(range(total), count)):
            damages[f"{stem}-train-{index:05d}"] = DAMAGES[order % len(DAMAGES)]
    return damages


def _write_file(folder: Path, row: Row) -> None:
    path, rng = folder / row.media, random.Random(row.seed)
    path.unlink(missing_ok=True)
    if row.scene.motion is None:
        path.write_bytes(encode_jpeg(render_image(row.scene, rng), rng))
    else:
        encode_mp4(*render_clip_frames(row.scene, rng), path)
    if row.damage is not None:
        damage(path, row.damage, rng)


def _write_tables(folder: Path, rows: list[Row]) -> None:
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        for row in rows:
            rng = random.Random(f"{row.seed}/captions")
            line: dict[str, Any] = {
                "sample_id": row.sample_id,
                "media": row.media,
                "kind": "image" if row.scene.motion is None else "video",
                "captions": captions(row.scene, rng, NUM_CAPTIONS),
                "split": row.split,
                "licence": LICENCE,
            }
            manifest.write(json.dumps(line) + "\n")
    truth = {
        "scenes": {row.sample_id: row.scene.to_dict() for row in rows},
        "broken": [row.sample_id for row in rows if row.damage is not None],
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
