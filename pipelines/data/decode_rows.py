"""Decode one block of rows; the operator that Ray Data runs, itself free of Ray."""

import pyarrow as pa

from pipelines.data import schema
from pipelines.data.batch import AUGMENTATION_SEED, Failure, ImageRows, pack
from pipelines.data.media import MediaError
from pipelines.data.samples import DecodeSettings, SampleDecoder
from pipelines.data.stage_costs import StageCosts, cost_columns

_COLUMNS = (schema.SAMPLE_ID, schema.MEDIA, schema.MEDIA_BYTES, schema.KIND, schema.START_S, schema.END_S)


class DecodeRows:
    """Turns a block of rows into `batch.pack`'s table.

    Rows that fail stay, with zero pixels; nothing raises.

    Args:
        settings: How files become pixels.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._decoder = SampleDecoder(settings)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Decode a block.

        Args:
            rows: Columns of the manifest, and those that `batch.pack` carries.
        """
        geometry = self._settings.preprocessing
        kinds = rows[schema.KIND].to_pylist()
        shapes = [(self._settings.num_frames_of(kind), 3, geometry.height, geometry.width) for kind in kinds]
        images = ImageRows(shapes)
        return pack(rows, images, *self.fill(rows, images))

    def fill(self, rows: pa.Table, images: ImageRows | None) -> tuple[list[Failure | None], list[StageCosts]]:
        """Decode rows into `images` (or nowhere, to check them); say which failed, and what each cost."""
        has_seeds = AUGMENTATION_SEED in rows.column_names
        seeds = rows[AUGMENTATION_SEED].to_pylist() if has_seeds else [None] * len(rows)
        columns = [rows[name].to_pylist() for name in _COLUMNS]
        failures: list[Failure | None] = []
        costs = [StageCosts() for _ in range(len(rows))]
        for row, (sample_id, media, data, kind, start_s, end_s) in enumerate(zip(*columns, strict=True)):
            failure = None
            if sample_id:
                try:
                    clip = self._decoder.decode(
                        kind=kind,
                        media=media,
                        data=data,
                        start_s=start_s,
                        end_s=end_s,
                        augmentation_seed=seeds[row],
                        costs=costs[row],
                    )
                    if images is not None:
                        images[row] = clip
                except MediaError as error:
                    failure = Failure(sample_id, media, error.stage, error.error_class, error.message, error.tries)
            failures.append(failure)
        return failures, costs

    def close(self) -> None:
        """End the video children."""
        self._decoder.close()


class CheckRows:
    """Decodes a block of rows and keeps only the failures, as quarantine rows.

    Args:
        settings: How files become pixels.
    """

    def __init__(self, settings: DecodeSettings) -> None:
        self._rows = DecodeRows(settings)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return one row for each input row: its id, its error or nulls, and what it cost."""
        failures, costs = self._rows.fill(rows, None)
        return pa.table(
            {
                schema.SAMPLE_ID: rows[schema.SAMPLE_ID],
                schema.STAGE: pa.array([f and f.stage for f in failures], pa.string()),
                schema.ERROR_CLASS: pa.array([f and f.error_class for f in failures], pa.string()),
                schema.MESSAGE: pa.array([f and f.message for f in failures], pa.string()),
                schema.TRIES: pa.array([f and f.tries for f in failures], pa.int32()),
                **cost_columns(costs),
            }
        )
