"""`qformer features`: run the frozen encoder once over a manifest and store what it sees."""

import logging
import sys
import time
from typing import Any

import pyarrow.compute as pc

from jobs.cli import run_job
from jobs.cluster_session import ray_session
from jobs.settings import FeaturesSettings
from pipelines.data import quarantine, schema, storage
from pipelines.data.manifest import read_manifest
from pipelines.data.samples import DecodeSettings, Limits

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 5.0


def main(settings: FeaturesSettings) -> dict[str, Any]:
    """Write or complete the cache.

    Returns:
        Its summary: fingerprint, rows_in, rows_used, rows_quarantined.

    Raises:
        UserError: If the folder holds something else or another encoder's features, or the manifest cannot be read.
    """
    from pipelines.data.encode_shards import EncoderChoice
    from pipelines.data.features import read_spec, write_spec

    data = settings.data
    manifest = read_manifest(data.manifest, data.split, needs_captions=False, kind=data.kind)
    # The actors run in other folders.
    output = storage.local_path(settings.output) if storage.is_local(settings.output) else settings.output
    is_folder = storage.is_local(settings.vision) and storage.exists(settings.vision)
    vision = storage.local_path(settings.vision) if is_folder else settings.vision
    choice = EncoderChoice(
        vision=vision,
        pretrained=settings.vision_pretrained,
        layer=settings.vision_layer,
        precision=settings.precision,
        num_frames=data.num_frames,
        dtype=settings.dtype,
        image_size=settings.vision_image_size,
    )
    spec = choice.load()[1]
    found = read_spec(output)
    if found is None:
        storage.require_unused(output, "output")
        write_spec(output, spec)
    else:
        spec.require_same(found)
    total_bytes = sum(spec.row_bytes(kind) for kind in manifest[schema.KIND].to_pylist())
    logger.info("%d rows will take %s in %s", len(manifest), _size(total_bytes), output)
    with ray_session(settings.ray):
        # Loads Ray, whose environment the session has to set first.
        from pipelines.data.dataset import write_features

        index = write_features(
            manifest,
            folder=output,
            choice=choice,
            spec=spec,
            decode=DecodeSettings(
                preprocessing=spec.preprocessing,
                num_frames=data.num_frames,
                sampling=data.sampling.build(),
                limits=Limits(**data.limits.model_dump()),
            ),
            frames_per_pass=settings.frames_per_pass,
            workers=settings.workers,
            decode_workers=settings.decode_workers,
            use_gpu=settings.use_gpu,
            on_progress=_Progress(len(manifest)),
        )
    failed = pc.sum(pc.is_valid(index[schema.ERROR_CLASS])).as_py() or 0
    print(quarantine.accounting_line(len(index), len(index) - failed, failed))
    logger.info("next: qformer train … --set data.features=%s", settings.output)
    return {
        "fingerprint": spec.fingerprint,
        "rows_in": len(index),
        "rows_used": len(index) - failed,
        "rows_quarantined": failed,
    }


class _Progress:
    """Tells how far the job is and how long the rest will take."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._begun_s = self._told_at_s = time.monotonic()
        self._found = 0

    def __call__(self, done: int, written_bytes: int) -> None:
        """Log the state; the first call tells what an earlier run had done."""
        now_s = time.monotonic()
        if not written_bytes:
            self._found = done
            if done:
                logger.info("%d of %d rows were there already", done, self._num_rows)
            return
        if done == self._num_rows or now_s - self._told_at_s > _PROGRESS_EVERY_S:
            self._told_at_s = now_s
            rate = (done - self._found) / (now_s - self._begun_s)
            left_s = (self._num_rows - done) / rate
            logger.info("encoded %d of %d rows, %.0f rows/s, %.0f s left", done, self._num_rows, rate, left_s)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


if __name__ == "__main__":
    sys.exit(run_job("features"))
