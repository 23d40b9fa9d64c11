"""The demo's table of measured values and bars, and its HTML report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs.demo.endpoint import ANSWERS_FILE
from jobs.demo.scoring import ATTRIBUTES, CaptionScores, is_right, score_captions
from jobs.demo.world.scenes import Scene
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.evaluation.report.page import GalleryItem, ResultRow, write_report
from qformer.conversion.checkpoint import INFO_FILE, BridgeInfo

MIN_ATTRIBUTE = 0.80
MIN_RECALL = 0.60
MAX_FROM_CHANCE = 0.05
NUM_SHOWN = 12
TITLE = "held-out colour-shape combinations"
KIND_NAMES = {"image": "images", "video": "clips"}


def measure(output: Path, *, min_whole_caption: float | None) -> list[ResultRow]:
    """Measure the results of the demo on held-out colour-shape pairs.

    Args:
        output: Folder of the demo.
        min_whole_caption: Bar of whole captions; None for no bar.
    """
    scenes = _scenes(output)
    predictions = pq.read_table(output / "captions" / "predictions.parquet").to_pylist()
    rows: list[ResultRow] = []
    for kind, name in KIND_NAMES.items():
        chosen = [row for row in predictions if row["kind"] == kind]
        truths = [scenes[row["sample_id"]] for row in chosen]
        rows += _caption_rows(name, score_captions(truths, [r["prediction"] for r in chosen]), min_whole_caption)
    retrieval = _read(output / "retrieval" / "retrieval.json")["kinds"]
    for kind, name in KIND_NAMES.items():
        rows += _retrieval_rows(name, retrieval[kind], has_bar=kind == "image")
    planted = set(_read(output / "world" / "truth.json")["broken"])
    found = set(pq.read_table(output / "data" / "quarantine.parquet")["sample_id"].to_pylist())
    return [*rows, quarantine_row(planted, found, "quarantined files"), _served_row(output)]


def show(table: Sequence[ResultRow], seconds: dict[str, float], title: str = TITLE) -> None:
    """Print the table and the durations of the steps."""
    view = Table(title=title, title_justify="left")
    for heading in ("measure", "measured", "bar", ""):
        view.add_column(heading, no_wrap=True)
    for row in table:
        view.add_row(row.name, row.measured, row.bar, {True: "ok", False: "MISSED", None: ""}[row.ok])
    console = Console()
    console.print(view)
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    console.print(f"seconds: {took}; in all {sum(seconds.values()):.0f}")


def exit_code(table: Sequence[ResultRow]) -> int:
    """Exit code: 0 if every bar is met, 1 otherwise."""
    return 1 if any(row.ok is False for row in table) else 0


def write(output: Path, table: Sequence[ResultRow]) -> None:
    """Write report.html: the table, loss curves, captions and retrieval examples with their pictures."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for stage in ("stage1", "stage2"):
        for line in (output / stage / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            for name, value in record.items():
                if name.startswith("loss/"):
                    curves.setdefault(f"{stage}/{name.removeprefix('loss/')}", []).append((record["step"], value))
    write_report(
        str(output / "report.html"), "Q-Former demo", table, curves, _galleries(output),
        summary="Captions and retrieval on colour-shape combinations that occur in no training data.",
    )  # fmt: skip


def _caption_rows(name: str, scores: CaptionScores, min_whole: float | None) -> list[ResultRow]:
    rows = []
    for attribute in ATTRIBUTES:
        if attribute not in scores.attributes:
            continue
        value, shuffled, chance = (s[attribute] for s in (scores.attributes, scores.shuffled, scores.chance))
        rows.append(at_least(f"{name}: {attribute}", value, MIN_ATTRIBUTE))
        rows.append(
            ResultRow(
                name=f"{name}: {attribute}, images shuffled",
                measured=f"{shuffled:.3f}",
                bar=f"chance {chance:.3f} ± {MAX_FROM_CHANCE}",
                ok=abs(shuffled - chance) <= MAX_FROM_CHANCE,
            )
        )
    return [*rows, at_least(f"{name}: whole caption ({scores.count})", scores.whole, min_whole)]


def _retrieval_rows(name: str, metrics: dict[str, Any], *, has_bar: bool) -> list[ResultRow]:
    bar = MIN_RECALL if has_bar else None
    pairs = f"{metrics['images']} pairs"
    return [
        at_least(f"{name}: image to text R@1, {pairs}", metrics["image_to_text"]["r1"], bar),
        at_least(f"{name}: text to image R@1, {pairs}", metrics["text_to_image"]["r1"], bar),
    ]


def quarantine_row(planted: set[str], found: set[str], name: str) -> ResultRow:
    """Row of the check that exactly the damaged files are quarantined."""
    return ResultRow(name=name, measured=str(len(found)), bar=f"the {len(planted)} planted", ok=found == planted)


def _served_row(output: Path) -> ResultRow:
    answers = _read(output / "served" / ANSWERS_FILE)
    equal = sum(answer["served"] == answer["offline"] for answer in answers)
    return ResultRow(
        name="served caption = offline caption", measured=str(equal), bar=f"= {len(answers)}", ok=equal == len(answers)
    )


def at_least(name: str, value: float, bar: float | None) -> ResultRow:
    """Row of a value with an optional lower bar."""
    if bar is None:
        return ResultRow(name=name, measured=f"{value:.3f}")
    return ResultRow(name=name, measured=f"{value:.3f}", bar=f"≥ {bar:.2f}", ok=value >= bar)


def _galleries(output: Path) -> dict[str, list[GalleryItem]]:
    scenes = _scenes(output)
    manifest = {row["sample_id"]: row for row in pq.read_table(output / "data" / "manifest.parquet").to_pylist()}
    checkpoint = sorted((output / "stage2" / "checkpoints").iterdir())[-1]
    info = BridgeInfo.from_json((checkpoint / INFO_FILE).read_text())
    decoder = SampleDecoder(DecodeSettings(preprocessing=info.preprocessing, num_frames=info.num_frames))
    try:

        def item(sample_id: str, lines: list[str], ok: bool) -> GalleryItem:
            row = manifest[sample_id]
            frames = list(decoder.decode(kind=row["kind"], media=row["media"]).pixels.transpose(0, 2, 3, 1))
            return GalleryItem(title=sample_id, frames=[enlarged(frame) for frame in frames], lines=lines, ok=ok)

        predictions = pq.read_table(output / "captions" / "predictions.parquet").to_pylist()
        galleries = {}
        for kind, name in KIND_NAMES.items():
            galleries[f"Captions of {name}"] = [
                item(
                    row["sample_id"],
                    [f"caption: {row['prediction']}", f"reference: {row['references'][0]}"],
                    is_right(scenes[row["sample_id"]], row["prediction"]),
                )
                for row in [row for row in predictions if row["kind"] == kind][:NUM_SHOWN]
            ]
        found = pq.read_table(output / "retrieval" / "retrieval.parquet").to_pylist()[:NUM_SHOWN]
        galleries["Texts found for images"] = [
            item(row["sample_id"], [f"{i + 1}. {text}" for i, text in enumerate(row["found"][:3])], row["rank"] == 0)
            for row in found
        ]
        return galleries
    finally:
        decoder.close()


def enlarged(frame: np.ndarray[Any, np.dtype[np.uint8]], factor: int = 2) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Enlarge a small picture."""
    image = Image.fromarray(frame)
    return np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))


def _scenes(output: Path) -> dict[str, Scene]:
    truth = _read(output / "world" / "truth.json")["scenes"]
    return {sample_id: Scene.from_dict(values) for sample_id, values in truth.items()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
