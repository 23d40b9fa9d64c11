"""Write the video demo's corpus: clips with and without sound, captions, the ground truth, and some damaged files."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.demo.video.world.grammar import captions
from jobs.demo.video.world.render import render_clip
from jobs.demo.video.world.scenes import ClipScene, draw_scenes
from jobs.demo.world.corpus import LICENCE
from jobs.demo.world.media_writing import DAMAGES, damage, write_media

TRUTH_FILE = "truth.json"
MANIFEST_FILE = "manifest.jsonl"
_MIN_BROKEN = 2


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip of the corpus."""

    sample_id: str
    scene: ClipScene
    split: str
    seed: str
    """Seed of appearance and sound; a test clip and its reversal share it."""
    damage: str | None = None

    @property
    def media(self) -> str:
        """Path relative to the folder of the corpus."""
        return f"clips/{self.sample_id}.mp4"


def write_clip_world(folder: Path, *, num_clips: int, num_test_clips: int, seed: int, broken_share: float) -> None:
    """Write `clips/`, `manifest.jsonl` and `truth.json`; the same seed gives the same corpus.

    Training scenes have no held-out colour-shape pair, test scenes only such. Every test clip occurs twice, forwards
    and backwards.

    Args:
        folder: Output folder; created if absent.
        num_clips: Number of training clips, damaged ones included.
        num_test_clips: Number of test clips, even.
        seed: Seed of everything.
        broken_share: Share of damaged training clips; 0 for none.

    Raises:
        ValueError: If `num_test_clips` is odd.
    """
    if num_test_clips % 2:
        raise ValueError(f"num_test_clips={num_test_clips} is odd; every test clip has its reversal")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/clip world")
    scenes = draw_scenes(rng, num_clips, held_out=False)
    broken = _choose_damages(rng, num_clips, broken_share)
    rows = [
        ClipRow(f"clip-train-{index:05d}", scene, "train", f"{seed}/clip-train-{index:05d}", broken.get(index))
        for index, scene in enumerate(scenes)
    ]
    for index, scene in enumerate(draw_scenes(rng, num_test_clips // 2, held_out=True)):
        name = f"clip-test-{index:05d}"
        rows.append(ClipRow(name, scene, "test", f"{seed}/{name}"))
        rows.append(ClipRow(f"{name}-reversed", scene.reversed(), "test", f"{seed}/{name}"))
    write_media(folder, rows, _write_file)
    _write_tables(folder, rows)


def read_scenes(folder: Path) -> dict[str, ClipScene]:
    """Return the scene of every sample id."""
    scenes = json.loads((folder / TRUTH_FILE).read_text(encoding="utf-8"))["stories"]
    return {sample_id: ClipScene.from_dict(values) for sample_id, values in scenes.items()}


def read_broken(folder: Path) -> set[str]:
    """Return the sample ids of the damaged files."""
    return set(json.loads((folder / TRUTH_FILE).read_text(encoding="utf-8"))["broken"])


def _choose_damages(rng: random.Random, num_clips: int, broken_share: float) -> dict[int, str]:
    if broken_share == 0:
        return {}
    num_broken = min(num_clips, max(_MIN_BROKEN, round(broken_share * num_clips)))
    chosen = rng.sample(range(num_clips), num_broken)
    return {index: DAMAGES[order % len(DAMAGES)] for order, index in enumerate(chosen)}


def _write_file(folder: Path, row: ClipRow) -> None:
    path = folder / row.media
    path.unlink(missing_ok=True)
    render_clip(row.scene, row.seed).write(path)
    if row.damage is not None:
        damage(path, row.damage, random.Random(f"{row.seed}/damage"))


def _write_tables(folder: Path, rows: list[ClipRow]) -> None:
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as manifest:
        for row in rows:
            line: dict[str, Any] = {
                "sample_id": row.sample_id,
                "media": row.media,
                "kind": "video",
                "captions": captions(row.scene),
                "split": row.split,
                "licence": LICENCE,
            }
            manifest.write(json.dumps(line) + "\n")
    truth = {
        "stories": {row.sample_id: row.scene.to_dict() for row in rows},
        "broken": [row.sample_id for row in rows if row.damage is not None],
    }
    (folder / TRUTH_FILE).write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
