"""Make the small tables that the decode operator turns into pixels."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data import schema
from pipelines.data.batch import AUGMENTATION_SEED, IMAGE_ID, RANK, STEP
from pipelines.data.order import PADDING, augmentation_seed, caption_index, rank_rows
from pipelines.data.transforms import Augmentation

_INPUT_COLUMNS = (schema.SAMPLE_ID, schema.MEDIA, schema.MEDIA_BYTES, schema.KIND, schema.START_S, schema.END_S)

_BLOCK_BYTES = 4 * 1024**2
_MAX_BLOCK_STEPS = 8


def training_blocks(
    manifest: pa.Table,
    batches: NDArray[np.int64],
    *,
    first_step: int,
    epochs: NDArray[np.int64],
    seed: int,
    world_size: int,
    augmentation: Augmentation,
    steps_per_block: int,
) -> list[pa.Table]:
    """Tables of a few steps of one rank each, dealt to the ranks in turn: rank 0, rank 1, ..., rank 0, ...

    Args:
        manifest: All rows.
        batches: Row indexes [steps, global batch], -1 for padding.
        first_step: Number of the first of these steps in the run.
        epochs: [steps] each step's epoch, 0-based; chooses captions and augmentations.
        seed: Of the run.
        world_size: Number of ranks.
        augmentation: When active, rows get seeds to draw it from.
        steps_per_block: Micro-batches of a table; the last table of each rank may hold fewer.
    """
    micro_batches = _micro_batches(manifest, batches, first_step, epochs, seed, world_size, augmentation)
    groups = [micro_batches[at : at + steps_per_block] for at in range(0, len(batches), steps_per_block)]
    return [
        pa.concat_tables([step[rank] for step in group]).combine_chunks()
        for group in groups
        for rank in range(world_size)
    ]


def block_steps(micro_batch_bytes: int) -> int:
    """How many micro-batches share a block: small ones together, for every block costs Ray the same."""
    return int(np.clip(_BLOCK_BYTES // max(1, micro_batch_bytes), 1, _MAX_BLOCK_STEPS))


def _micro_batches(
    manifest: pa.Table,
    batches: NDArray[np.int64],
    first_step: int,
    epochs: NDArray[np.int64],
    seed: int,
    world_size: int,
    augmentation: Augmentation,
) -> list[list[pa.Table]]:
    """Tables [step][rank]."""
    tables = []
    for offset, (batch, step_epoch) in enumerate(zip(batches, epochs, strict=True)):
        epoch = int(step_epoch)
        # A rank may get nothing but padding; it still needs the kind, which decides the number of frames.
        kind = manifest[schema.KIND][int(batch[batch != PADDING][0])].as_py()
        ranks = []
        for rank, rows in enumerate(rank_rows(batch, world_size)):
            captions: list[str] = []
            instructions: list[str] = []
            seeds: list[int | None] = []
            kept = manifest.take(pa.array(np.where(rows == PADDING, 0, rows)))
            columns = (kept[name].to_pylist() for name in (schema.SAMPLE_ID, schema.CAPTIONS, schema.INSTRUCTIONS))
            for name, choices, questions in zip(*columns, strict=True):
                index = caption_index(seed, epoch, name, len(choices)) if choices else 0
                captions.append(choices[index] if choices else "")
                instructions.append(_instruction(questions, index))
                seeds.append(augmentation_seed(seed, epoch, name) if augmentation.is_active else None)
            if (rows == PADDING).any():
                kept = _blanked(kept, rows == PADDING, kind)
                captions, instructions = (
                    ["" if is_blank else text for text, is_blank in zip(texts, rows == PADDING, strict=True)]
                    for texts in (captions, instructions)
                )
            ranks.append(_block(kept, captions, instructions, seeds, first_step + offset, rank))
        tables.append(ranks)
    return tables


def evaluation_blocks(manifest: pa.Table, batch_size: int) -> list[pa.Table]:
    """Every row once, in the manifest's order within its kind, in tables of one kind and at most `batch_size` rows.

    The step column numbers the tables; captions are left empty, for evaluation wants all of them. A row with several
    instructions gets its first; `jobs.evaluate` refuses such rows.
    """
    kinds = np.asarray(manifest[schema.KIND].to_pylist())
    blocks: list[pa.Table] = []
    for kind in schema.KINDS:
        rows = np.flatnonzero(kinds == kind)
        for start in range(0, len(rows), batch_size):
            kept = manifest.take(pa.array(rows[start : start + batch_size]))
            count = len(kept)
            instructions = [_instruction(questions, 0) for questions in kept[schema.INSTRUCTIONS].to_pylist()]
            blocks.append(_block(kept, [""] * count, instructions, [None] * count, len(blocks), 0))
    return blocks


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
    kept: pa.Table, captions: list[str], instructions: list[str], seeds: Sequence[int | None], step: int, rank: int
) -> pa.Table:
    count = len(kept)
    block = kept.select(_carried(kept))
    return (
        block.append_column(schema.CAPTION, pa.array(captions, pa.string()))
        .append_column(schema.INSTRUCTION, pa.array(instructions, pa.string()))
        .append_column(IMAGE_ID, pa.array(image_ids(block), pa.int64()))
        .append_column(AUGMENTATION_SEED, pa.array(seeds, pa.int64()))
        .append_column(STEP, pa.array([step] * count, pa.int64()))
        .append_column(RANK, pa.array([rank] * count, pa.int32()))
        .combine_chunks()
    )


def _blanked(kept: pa.Table, is_padding: NDArray[np.bool_], kind: str) -> pa.Table:
    """Empty the padding rows: no id, no media, but the batch's kind."""
    columns = {}
    for name in _carried(kept):
        blank = {schema.SAMPLE_ID: "", schema.KIND: kind}.get(name)
        scalar = pa.scalar(blank, kept.schema.field(name).type)
        columns[name] = pc.if_else(pa.array(~is_padding), kept[name], scalar)
    return pa.table(columns, schema=kept.select(_carried(kept)).schema)


def _carried(manifest: pa.Table) -> list[str]:
    """Columns that the operator needs; where features lie only when they were located."""
    return [*_INPUT_COLUMNS, *(name for name in schema.FEATURE_COLUMNS if name in manifest.column_names)]
