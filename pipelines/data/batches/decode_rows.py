"""Decode or check one block of rows: the operators that Ray Data runs, without Ray themselves."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.data import schema
from pipelines.data.batches.audio_rows import AudioRows
from pipelines.data.batches.batch import AUGMENTATION_SEED, ImageRows, pack
from pipelines.data.failures import Failure, MediaError
from pipelines.data.media.check_result import CheckResult
from pipelines.data.media.crash_marker import CrashMarker
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.media.stage_costs import StageCosts, cost_columns

_COLUMNS = (schema.SAMPLE_ID, schema.MEDIA, schema.MEDIA_BYTES, schema.KIND, schema.START_S, schema.END_S)


class DecodeRows:
    """Decodes a block of rows to `batch.pack`'s table.

    Rows that fail stay in the table with zero pixels; nothing is raised. If an image crashes the process, as damaged
    files can, its successor decodes images in child processes, where a crash fails one row alone.

    Args:
        settings: Decode settings.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._marker = CrashMarker()
        # After a crash the block is tried again; in children, the image that caused it fails alone.
        self._decoder = SampleDecoder(settings, isolates_images=self._marker.follows_crash)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Decode a block.

        Args:
            rows: Rows with the manifest's columns and those that `batch.pack` needs.
        """
        geometry = self._settings.preprocessing
        kinds = rows[schema.KIND].to_pylist()
        shapes = [(self._settings.num_frames_of(kind), 3, geometry.height, geometry.width) for kind in kinds]
        images = ImageRows(shapes)
        sampling = self._settings.audio
        audio = None if sampling is None else AudioRows(len(rows), *sampling.shape)
        return pack(rows, images, *self.fill(rows, images, audio), audio)

    def fill(
        self, rows: pa.Table, images: ImageRows, audio: AudioRows | None = None
    ) -> tuple[list[Failure | None], list[StageCosts]]:
        """Decode rows into `images` and `audio`; return the failure and the costs of each."""
        has_seeds = AUGMENTATION_SEED in rows.column_names
        seeds = rows[AUGMENTATION_SEED].to_pylist() if has_seeds else [None] * len(rows)
        failures: list[Failure | None] = []
        costs = [StageCosts() for _ in range(len(rows))]
        for row, sample in enumerate(_samples(rows)):
            failure = None
            if sample.sample_id:
                try:
                    with self._marker if sample.kind == schema.IMAGE else contextlib.nullcontext():
                        clip = self._decoder.decode(**sample.arguments, seed=seeds[row], costs=costs[row])
                    images[row] = clip.pixels
                    images.frame_valid[row] = clip.frame_valid.tolist()
                    if audio is not None and clip.waveforms is not None and clip.audio_valid is not None:
                        audio[row] = clip.waveforms[clip.audio_valid], clip.audio_valid.tolist()
                except MediaError as error:
                    failure = Failure(
                        sample.sample_id, sample.media, error.stage, error.error_class, error.message, error.tries
                    )
            failures.append(failure)
        return failures, costs

    def close(self) -> None:
        """End the video children."""
        self._decoder.close()
        self._marker.close()


class CheckRows:
    """Decodes a block of rows to find the facts of each file, or why it cannot be used.

    Args:
        settings: Decode settings.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        self._decoder = SampleDecoder(settings)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return one row for each input row, in order.

        Columns: the sample id; `stage`, `error_class`, `message` and `tries` of a failure, or nulls; those of
        `schema.FACTS_SCHEMA`; and `stage_costs.COST_COLUMNS`. Among the facts, `size_bytes` and `content_hash` (blake2b
        of the file's bytes, 128 bits, hexadecimal) are set whenever the file could be read; the others
        (`facts.MediaFacts`: codec, display size, duration, frame rate, frames, rotation, sound) only when it could be
        decoded. `duration_s` and `fps` are null for images. Facts describe the whole file, also where the
        row is a part of it.
        """
        found: dict[Any, CheckResult] = {}
        return make_check_table(rows, [self._check(sample, found) for sample in _samples(rows)])

    def _check(self, sample: "_Sample", found: dict[Any, CheckResult]) -> CheckResult:
        """Check a sample, or reuse the result of the same part of the same file earlier in the block."""
        part = (sample.media, sample.kind, sample.start_s, sample.end_s)
        if sample.data is None and part in found:
            return dataclasses.replace(found[part], costs=StageCosts())
        result = self._decoder.check(**sample.arguments)
        if sample.data is None:
            found[part] = result
        return result


def make_check_table(rows: pa.Table, results: Sequence[CheckResult]) -> pa.Table:
    """Make the table that `CheckRows` returns.

    Args:
        rows: Checked rows.
        results: Result of each row.
    """
    errors = [one.error for one in results]
    facts = [
        {
            schema.SIZE_BYTES: one.size_bytes,
            schema.CONTENT_HASH: one.content_hash,
            **(one.facts.to_dict() if one.facts else {}),
        }
        for one in results
    ]
    columns = pa.Table.from_pylist(facts, schema=schema.FACTS_SCHEMA)
    return pa.table(
        {
            schema.SAMPLE_ID: rows[schema.SAMPLE_ID],
            schema.STAGE: pa.array([e and e.stage for e in errors], pa.string()),
            schema.ERROR_CLASS: pa.array([e and e.error_class for e in errors], pa.string()),
            schema.MESSAGE: pa.array([e and e.message for e in errors], pa.string()),
            schema.TRIES: pa.array([e and e.tries for e in errors], pa.int32()),
            **{name: columns[name] for name in columns.column_names},
            **cost_columns(one.costs for one in results),
        }
    )


class _Sample(NamedTuple):
    sample_id: str
    media: str | None
    data: bytes | None
    kind: str
    start_s: float | None
    end_s: float | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `SampleDecoder.decode` and `check`."""
        return {name: value for name, value in self._asdict().items() if name != "sample_id"}


def _samples(rows: pa.Table) -> list[_Sample]:
    columns = [rows[name].to_pylist() for name in _COLUMNS]
    return [_Sample(*values) for values in zip(*columns, strict=True)]
