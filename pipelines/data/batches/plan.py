"""Plans of what is decoded when, as tables of row numbers, and the look-up of these rows."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data import schema
from pipelines.data.batches.batch import AUGMENTATION_SEED, IMAGE_ID, RANK, STEP
from pipelines.data.order.global_batches import PADDING, StepRows, augmentation_seed, caption_index, rank_columns
from pipelines.data.order.row_index import ManifestRows

_INPUT_COLUMNS = (schema.SAMPLE_ID, schema.MEDIA, schema.MEDIA_BYTES, schema.KIND, schema.START_S, schema.END_S)
_ROW, _VISIT = "row", "visit"

_BLOCK_BYTES = 4 * 1024**2
_MAX_BLOCK_STEPS = 8


class NumberedRows(Protocol):
    """Rows that can be taken by number."""

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """The rows of these numbers, in this order."""


def training_blocks(batches: StepRows, *, first_step: int, world_size: int, steps_per_block: int) -> list[pa.Table]:
    """Make plans of a few steps of one rank each, in round-robin order of ranks: rank 0, rank 1, ..., rank 0, ...

    Args:
        batches: Rows of consecutive steps.
        first_step: Number of the first of these steps in the run.
        world_size: Number of ranks.
        steps_per_block: Number of micro-batches of a table; the last table of each rank may have fewer.

    Returns:
        Tables for `RowLookup`: step, rank, kind, row number and visit; `PADDING` where a rank's share is not full.
    """
    num_steps, global_batch = batches.rows_SG.shape
    columns_RC = rank_columns(global_batch, world_size)
    kind_codes = np.array([schema.KINDS.index(kind) for kind in batches.kinds], dtype=np.int8)
    kinds = pa.array(schema.KINDS, pa.string())
    blocks = []
    for start in range(0, num_steps, steps_per_block):
        steps = np.arange(start, min(start + steps_per_block, num_steps))
        for rank, columns_C in enumerate(columns_RC):
            rows_SC = np.where(columns_C == PADDING, PADDING, batches.rows_SG[steps][:, columns_C])
            width = len(columns_C)
            blocks.append(
                pa.table(
                    {
                        STEP: np.repeat(first_step + steps, width),
                        RANK: np.full(rows_SC.size, rank, dtype=np.int32),
                        schema.KIND: pa.DictionaryArray.from_arrays(np.repeat(kind_codes[steps], width), kinds),
                        _ROW: rows_SC.ravel(),
                        _VISIT: batches.visits_SG[steps][:, columns_C].ravel(),
                    }
                )
            )
    return blocks


def block_steps(micro_batch_bytes: int) -> int:
    """Number of micro-batches in a block: several if they are small, because Ray's cost per block is constant."""
    return int(np.clip(_BLOCK_BYTES // max(1, micro_batch_bytes), 1, _MAX_BLOCK_STEPS))


class RowLookup:
    """Turns a plan of `training_blocks` into the input rows of a decode operator.

    Args:
        rows: The corpus.
        seed: Seed of the run, which with a row's visit and id chooses caption and augmentation.
        is_random: Whether rows get seeds for their frames and augmentations.
    """

    def __init__(self, rows: NumberedRows, *, seed: int, is_random: bool) -> None:
        self._rows, self._seed, self._is_random = rows, seed, is_random

    def __call__(self, plan: pa.Table) -> pa.Table:
        """Look up one block; padding has no id, media or caption, but the kind of the batch."""
        numbers = plan[_ROW].to_numpy()
        is_padding = numbers == PADDING
        found = self._rows.take(numbers[~is_padding])
        # A null index gives a row of nulls.
        places = pa.array(np.cumsum(~is_padding) - 1, mask=is_padding)
        rows = found.take(places)
        rows = _replaced(rows, schema.SAMPLE_ID, pc.fill_null(rows[schema.SAMPLE_ID], ""))
        rows = _replaced(rows, schema.KIND, plan[schema.KIND].cast(pa.string()))
        captions, instructions, seeds = [], [], []
        columns = (rows[schema.SAMPLE_ID], rows[schema.CAPTIONS], rows[schema.INSTRUCTIONS], plan[_VISIT])
        for name, choices, questions, visit in zip(*(column.to_pylist() for column in columns), strict=True):
            index = caption_index(self._seed, visit, name, len(choices)) if choices else 0
            captions.append(choices[index] if choices else "")
            instructions.append(_instruction(questions, index))
            seeds.append(augmentation_seed(self._seed, visit, name) if self._is_random and name else None)
        return _block(rows, captions, instructions, seeds, plan[STEP], plan[RANK])


def lacks_caption(rows: pa.Table) -> NDArray[np.bool_]:
    """[rows] True where a row of `RowLookup` has no caption and is not padding; it cannot be trained on."""
    has_text = pc.greater(pc.binary_length(rows[schema.CAPTION]), 0)
    return np.asarray(pc.and_(pc.not_equal(rows[schema.SAMPLE_ID], ""), pc.invert(has_text)))


def mark_failed(decoded: pa.Table, is_bad: NDArray[np.bool_], message: str) -> pa.Table:
    """Mark rows of a decoded block as failed because of their manifest row."""
    failure = {schema.STAGE: "manifest", schema.ERROR_CLASS: "config", schema.MESSAGE: message, schema.TRIES: 1}
    for name, value in failure.items():
        scalar = pa.scalar(value, decoded.schema.field(name).type)
        decoded = _replaced(decoded, name, pc.if_else(pa.array(is_bad), scalar, decoded[name]))
    return decoded


def evaluation_blocks(rows: ManifestRows, batch_size: int) -> Iterator[pa.Table]:
    """Every row once, in the manifest's order within its kind, in tables of one kind and at most `batch_size` rows.

    The step column numbers the tables; captions are empty, because evaluation uses all of them. A row with several
    instructions gets its first; `jobs.evaluate.job` rejects such rows. Each table is read on demand.
    """
    number = first = 0
    for count in rows.counts.values():
        for start in range(first, first + count, batch_size):
            chunk = rows.take(np.arange(start, min(start + batch_size, first + count)))
            steps, ranks = pa.array([number] * len(chunk), pa.int64()), pa.array([0] * len(chunk), pa.int32())
            instructions = [_instruction(questions, 0) for questions in chunk[schema.INSTRUCTIONS].to_pylist()]
            yield _block(chunk, [""] * len(chunk), instructions, [None] * len(chunk), steps, ranks)
            number += 1
        first += count


def image_ids(rows: pa.Table) -> list[int]:
    """63-bit hashes of media and clip bounds; equal rows get equal numbers."""
    ids = []
    columns = (rows[name].to_pylist() for name in (schema.MEDIA, schema.MEDIA_BYTES, schema.START_S, schema.END_S))
    for media, data, start_s, end_s in zip(*columns, strict=True):
        content = data if data is not None else str(media).encode("utf-8", errors="surrogatepass")
        digest = hashlib.blake2b(content, digest_size=8, key=f"{start_s}/{end_s}".encode()).digest()
        ids.append(int.from_bytes(digest, "little") >> 1)
    return ids


def _instruction(questions: list[str] | None, index: int) -> str:
    """The instruction of caption `index`; "" where the row has none."""
    return questions[index if len(questions) > 1 else 0] if questions else ""


def _block(
    rows: pa.Table,
    captions: list[str],
    instructions: list[str],
    seeds: Sequence[int | None],
    steps: pa.ChunkedArray,
    ranks: pa.ChunkedArray,
) -> pa.Table:
    # Rows have feature columns only after `features.cache.locate`.
    located = (name for name in schema.FEATURE_COLUMNS if name in rows.column_names)
    block = rows.select([*_INPUT_COLUMNS, *located])
    return (
        block.append_column(schema.CAPTION, pa.array(captions, pa.string()))
        .append_column(schema.INSTRUCTION, pa.array(instructions, pa.string()))
        .append_column(IMAGE_ID, pa.array(image_ids(block), pa.int64()))
        .append_column(AUGMENTATION_SEED, pa.array(seeds, pa.int64()))
        .append_column(STEP, steps)
        .append_column(RANK, ranks)
        .combine_chunks()
    )


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)
