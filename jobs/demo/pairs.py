"""Test set of retrieval: pairs of one picture and one caption, all of different meanings."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.world.scenes import Scene


def write_retrieval_pairs(manifest: Path, world: Path, output: Path, count: int) -> None:
    """Select test rows of distinct meanings, with one caption each.

    Args:
        manifest: Prepared manifest.
        world: Folder with truth.json.
        output: Parquet file to write, with the manifest's columns.
        count: Largest number of pairs of each kind; there may be fewer meanings.
    """
    scenes: dict[str, Any] = json.loads((world / "truth.json").read_text())["scenes"]
    table = pq.read_table(manifest)
    chosen: list[dict[str, Any]] = []
    used: set[tuple[str, Scene]] = set()
    for row in table.to_pylist():
        meaning = (row["kind"], Scene.from_dict(scenes[row["sample_id"]]).canonical())
        if row["split"] != "test" or meaning in used:
            continue
        if sum(kind == row["kind"] for kind, _ in used) == count:
            continue
        used.add(meaning)
        caption = random.Random(row["sample_id"]).choice(row["captions"])
        chosen.append({**row, "captions": [caption]})
    output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(chosen, schema=table.schema), output)
