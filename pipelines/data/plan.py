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
    is_random: bool,
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
        is_random: Whether rows get seeds, to draw their frames and augmentations from.
        steps_per_block: Micro-batches of a table; the last table of each rank may hold fewer.
    """
    micro_batches = _micro_batches(manifest, batches, first_step, epochs, seed, world_size, is_random)
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
    is_random: bool,
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
            seeds: list[int | None] = []
            kept = manifest.take(pa.array(np.where(rows == PADDING, 0, rows)))
            names, texts = kept[schema.SAMPLE_ID].to_pylist(), kept[schema.CAPTIONS].to_pylist()
            for name, choices in zip(names, texts, strict=True):
                captions.append(choices[caption_index(seed, epoch, name, len(choices))] if choices else "")
                seeds.append(augmentation_seed(seed, epoch, name) if is_random else None)
            if (rows == PADDING).any():
                kept, captions = _blanked(kept, rows == PADDING, kind, captions)
            ranks.append(_block(kept, captions, seeds, first_step + offset, rank))
        tables.append(ranks)
    return tables


def evaluation_blocks(manifest: pa.Table, batch_size: int) -> list[pa.Table]:
    """Every row once, in the manifest's order within its kind, in tables of one kind and at most `batch_size` rows.

    The step column numbers the tables; captions are left empty, for evaluation wants all of them.
    """
    kinds = np.asarray(manifest[schema.KIND].to_pylist())
    blocks: list[pa.Table] = []
    for kind in schema.KINDS:
        rows = np.flatnonzero(kinds == kind)
        for start in range(0, len(rows), batch_size):
            kept = manifest.take(pa.array(rows[start : start + batch_size]))
            count = len(kept)
            blocks.append(_block(kept, [""] * count, [None] * count, len(blocks), 0))
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


def _block(kept: pa.Table, captions: list[str], seeds: Sequence[int | None], step: int, rank: int) -> pa.Table:
    count = len(kept)
    block = kept.select(_carried(kept))
    return (
        block.append_column(schema.CAPTION, pa.array(captions, pa.string()))
        .append_column(IMAGE_ID, pa.array(image_ids(block), pa.int64()))
        .append_column(AUGMENTATION_SEED, pa.array(seeds, pa.int64()))
        .append_column(STEP, pa.array([step] * count, pa.int64()))
        .append_column(RANK, pa.array([rank] * count, pa.int32()))
        .combine_chunks()
    )


def _blanked(
    kept: pa.Table, is_padding: NDArray[np.bool_], kind: str, captions: list[str]
) -> tuple[pa.Table, list[str]]:
    """Empty the padding rows: no id, no media, no caption, but the batch's kind."""
    columns = {}
    for name in _carried(kept):
        blank = {schema.SAMPLE_ID: "", schema.KIND: kind}.get(name)
        scalar = pa.scalar(blank, kept.schema.field(name).type)
        columns[name] = pc.if_else(pa.array(~is_padding), kept[name], scalar)
    texts = ["" if is_blank else text for text, is_blank in zip(captions, is_padding, strict=True)]
    return pa.table(columns, schema=kept.select(_carried(kept)).schema), texts


def _carried(manifest: pa.Table) -> list[str]:
    """Columns that the operator needs; where features lie only when they were located."""
    return [*_INPUT_COLUMNS, *(name for name in schema.FEATURE_COLUMNS if name in manifest.column_names)]
