"""Serve the demo's checkpoint and request captions by HTTP, for comparison with the offline captions."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.serve.job import running_service
from jobs.settings.serve import ServeSettings
from pipelines.serving.app.client import request_caption

NUM_FILES = {"image": 6, "video": 4}
ANSWERS_FILE = "answers.json"

logger = logging.getLogger(__name__)


def query_endpoint(output: Path, port: int) -> None:
    """Post some test files to a served checkpoint and write the answers with the offline captions.

    Needs an initialised Ray.

    Args:
        output: Folder of the demo.
        port: Port of the service, on loopback.
    """
    predictions = pq.read_table(output / "captions" / "predictions.parquet").to_pylist()
    manifest = pq.read_table(output / "data" / "manifest.parquet", columns=["sample_id", "media"]).to_pylist()
    media = {row["sample_id"]: row["media"] for row in manifest}
    chosen: list[dict[str, Any]] = []
    for kind, count in NUM_FILES.items():
        chosen += [row for row in predictions if row["kind"] == kind][:count]
    answers = []
    with running_service(ServeSettings(checkpoint=str(output / "stage2"), port=port)) as url:
        for row in chosen:
            caption = request_caption(url, Path(media[row["sample_id"]]).read_bytes())["caption"]
            answers.append({"sample_id": row["sample_id"], "offline": row["prediction"], "served": caption})
            logger.info("caption of %s: %s", row["sample_id"], caption)
    folder = output / "served"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANSWERS_FILE).write_text(json.dumps(answers, indent=1) + "\n")
