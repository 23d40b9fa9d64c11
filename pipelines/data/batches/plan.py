"""Tables of row numbers that say what is decoded when, and the look-up that turns them into rows to decode."""

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
    """Plans of a few steps of one rank each, dealt to the ranks in turn: rank 0, rank 1, ..., rank 0, ...

    Args:
        batches: Of consecutive steps.
        first_step: Number of the first of these steps in the run.
        world_size: Number of ranks.
        steps_per_block: Micro-batches of a table; the last table of each rank may hold fewer.

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
    """How many micro-batches share a block: small ones together, for every block costs Ray the same."""
    return int(np.clip(_BLOCK_BYTES // max(1, micro_batch_bytes), 1, _MAX_BLOCK_STEPS))


class RowLookup:
    """Turns a plan of `training_blocks` into the rows that a decode operator wants.

    Args:
        rows: The corpus.
        seed: Of the run; with a row's visit and id it chooses caption and augmentation.
        is_random: Whether rows get seeds, to draw their frames and augmentations from.
    """

    def __init__(self, rows: NumberedRows, *, seed: int, is_random: bool) -> None:
        self._rows, self._seed, self._is_random = rows, seed, is_random

    def __call__(self, plan: pa.Table) -> pa.Table:
        """Look one block up; padding has no id, no media and no caption, but the batch's kind."""
        numbers = plan[_ROW].to_numpy()
        is_padding = numbers == PADDING
        found = self._rows.take(numbers[~is_padding])
        # A null index makes a row of nulls.
        places = pa.array(np.cumsum(~is_padding) - 1, mask=is_padding)
        kept = found.take(places)
        kept = _replaced(kept, schema.SAMPLE_ID, pc.fill_null(kept[schema.SAMPLE_ID], ""))
        kept = _replaced(kept, schema.KIND, plan[schema.KIND].cast(pa.string()))
        captions, instructions, seeds = [], [], []
        columns = (kept[schema.SAMPLE_ID], kept[schema.CAPTIONS], kept[schema.INSTRUCTIONS], plan[_VISIT])
        for name, choices, questions, visit in zip(*(column.to_pylist() for column in columns), strict=True):
            index = caption_index(self._seed, visit, name, len(choices)) if choices else 0
            captions.append(choices[index] if choices else "")
            instructions.append(_instruction(questions, index))
            seeds.append(augmentation_seed(self._seed, visit, name) if self._is_random and name else None)
        return _block(kept, captions, instructions, seeds, plan[STEP], plan[RANK])


def lacks_caption(rows: pa.Table) -> NDArray[np.bool_]:
    """Which rows of `RowLookup` are no padding but have no caption: nothing can be learnt from them."""
    has_text = pc.greater(pc.binary_length(rows[schema.CAPTION]), 0)
    return np.asarray(pc.and_(pc.not_equal(rows[schema.SAMPLE_ID], ""), pc.invert(has_text)))


def mark_failed(decoded: pa.Table, is_bad: NDArray[np.bool_], message: str) -> pa.Table:
    """Mark rows of a decoded block as failed for what their manifest says."""
    failure = {schema.STAGE: "manifest", schema.ERROR_CLASS: "config", schema.MESSAGE: message, schema.TRIES: 1}
    for name, value in failure.items():
        scalar = pa.scalar(value, decoded.schema.field(name).type)
        decoded = _replaced(decoded, name, pc.if_else(pa.array(is_bad), scalar, decoded[name]))
    return decoded


def evaluation_blocks(rows: ManifestRows, batch_size: int) -> Iterator[pa.Table]:
    """Every row once, in the manifest's order within its kind, in tables of one kind and at most `batch_size` rows.

    The step column numbers the tables; captions are left empty, for evaluation wants all of them. A row with several
    instructions gets its first; `jobs.evaluate.job` refuses such rows. A table is read when it is asked for.
    """
    number = first = 0
    for count in rows.counts.values():
        for start in range(first, first + count, batch_size):
            kept = rows.take(np.arange(start, min(start + batch_size, first + count)))
            steps, ranks = pa.array([number] * len(kept), pa.int64()), pa.array([0] * len(kept), pa.int32())
            instructions = [_instruction(questions, 0) for questions in kept[schema.INSTRUCTIONS].to_pylist()]
            yield _block(kept, [""] * len(kept), instructions, [None] * len(kept), steps, ranks)
            number += 1
        first += count


def image_ids(rows: pa.Table) -> list[int]:
    """Numbers that are equal where media and clip bounds are, 63 bits of a hash."""
    ids = []
    columns = (rows[name].to_pylist() for name in (schema.MEDIA, schema.MEDIA_BYTES, schema.START_S, schema.END_S))
    for media, data, start_s, end_s in zip(*columns, strict=True):
        content = data if data is not None else str(media).encode("utf-8", errors="surrogatepass")
        digest = hashlib.blake2b(content, digest_size=8, key=f"{start_s}/{end_s}".encode()).digest()
        ids.append(int.from_bytes(digest, "little") >> 1)
    return ids


def _instruction(questions: list[str] | None, index: int) -> str:
    """The instruction that belongs to caption `index`; "" where the row has none."""
    return questions[index if len(questions) > 1 else 0] if questions else ""


def _block(
    kept: pa.Table,
    captions: list[str],
    instructions: list[str],
    seeds: Sequence[int | None],
    steps: pa.ChunkedArray,
    ranks: pa.ChunkedArray,
) -> pa.Table:
    # Where features lie is known only where they were located.
    located = (name for name in schema.FEATURE_COLUMNS if name in kept.column_names)
    block = kept.select([*_INPUT_COLUMNS, *located])
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
