"""Decoded micro-batches, and their form as Arrow tables."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data import schema
from pipelines.data.batches.audio_rows import AudioRows, unpack_audio
from pipelines.data.batches.token_codec import RAW_DTYPES, TokenDtype, decode_tokens
from pipelines.data.failures import Failure
from pipelines.data.media.stage_costs import COST_COLUMNS, StageCosts, cost_columns, sum_costs

STEP, RANK, IMAGE_ID, AUGMENTATION_SEED = "step", "rank", "image_id", "augmentation_seed"
_VALUES, _SHAPE, _CODEC, _FRAME_VALID = "values", "shape", "codec", "frame_valid"
PIXELS: Final = "pixels"


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """The samples of one rank in one step. B samples, T frames, C channels, H height, W width, P tokens.

    For sound: A segments a sample, N samples a segment, V width of the frozen audio encoder.
    """

    step: int
    rank: int
    sample_ids: list[str]
    """"" for padding."""
    captions: list[str]
    """The caption chosen for this epoch; "" for padding."""
    image_ids: NDArray[np.int64]
    """[B] equal where two samples have the same media and the same part of it."""
    is_valid: NDArray[np.bool_]
    """[B] False for padding and for failed samples, whose images are zero."""
    images: NDArray[Any]
    """uint8 pixels [B, T, C, H, W]; or, from a feature cache, the frozen encoder's tokens [B, T, P, V] in float16 or
    float32. T is 1 for images. A batch has one kind of media."""
    failures: list[Failure]
    frame_valid: NDArray[np.bool_]
    """[B, T] False where a frame repeats another of its clip; all True where `is_valid` is False."""
    instructions: Sequence[str] = ()
    """Question or prompt of each caption; "" to use the run's own prompt, () to use it for all."""
    audio: NDArray[Any] | None = None
    """Waveforms [B, A, N], float32 mono within [-1, 1]; or, from a feature cache, the frozen audio encoder's vectors
    [B, A, V] in float16 or float32. Zero where not valid; None without sound."""
    audio_valid: NDArray[np.bool_] | None = None
    """[B, A] as `Clip.audio_valid`; all False where `is_valid` is False."""
    costs: StageCosts = field(default_factory=StageCosts)
    """Costs summed over these rows."""
    queue_depth: int = 0
    """Number of batches ready after this one when the training worker took it."""


class ImageRows:
    """Zeroed memory for a table's images, pixels or encoded tokens; rows may differ in their number of frames.

    Args:
        shapes: Shape of each row's array, [T, ...].
        codec: `PIXELS`, or the storage type of cached tokens.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], codec: Literal["pixels"] | TokenDtype = PIXELS) -> None:
        self.shapes, self.codec = [list(shape) for shape in shapes], codec
        item_bytes = _raw_dtype(codec).itemsize
        sizes = [math.prod(shape) * item_bytes for shape in shapes]
        self.offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])
        self.flat = np.zeros(int(self.offsets[-1]), dtype=np.uint8)
        self.frame_valid = [[True] * shape[0] for shape in shapes]
        """[rows][T] False where a frame repeats another."""

    def __setitem__(self, row: int, values: NDArray[Any]) -> None:
        assert list(values.shape) == self.shapes[row], f"row {row}: {values.shape}, not {self.shapes[row]}"
        assert values.dtype == _raw_dtype(self.codec), f"row {row}: {values.dtype} is not {self.codec}"
        self.flat[self.offsets[row] : self.offsets[row + 1]] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def pack(
    rows: pa.Table,
    images: ImageRows,
    failures: Sequence[Failure | None],
    costs: Sequence[StageCosts],
    audio: AudioRows | None = None,
) -> pa.Table:
    """Join rows with their images and sound into one Arrow table, without copying the images.

    Args:
        rows: Columns `STEP`, `RANK`, `IMAGE_ID`, sample id, media, caption and instruction.
        images: Images of these rows.
        failures: One entry a row, None where it was decoded (or is padding).
        costs: One entry a row.
        audio: Sound of these rows; None: no sound.
    """
    buffers = [None, pa.py_buffer(images.offsets), pa.py_buffer(images.flat)]
    packed = pa.table(
        {
            **{name: rows[name] for name in _PASSED_COLUMNS},
            schema.STAGE: [failure and failure.stage for failure in failures],
            schema.ERROR_CLASS: [failure and failure.error_class for failure in failures],
            schema.MESSAGE: [failure and failure.message for failure in failures],
            schema.TRIES: [failure and failure.tries for failure in failures],
            **cost_columns(costs),
            _CODEC: [images.codec] * len(rows),
            _SHAPE: images.shapes,
            _FRAME_VALID: images.frame_valid,
            _VALUES: pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers),
        },
        schema=_PACKED_SCHEMA,
    )
    for name, column in ({} if audio is None else audio.columns()).items():
        packed = packed.append_column(name, column)
    return packed


def split_steps(table: pa.Table) -> Iterator[pa.Table]:
    """Split a packed table where the step changes."""
    steps = table[STEP].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    for start, end in itertools.pairwise(edges):
        yield table.slice(start, end - start)


def unpack(table: pa.Table) -> SampleBatch:
    """Rebuild one step's batch from `pack`'s table.

    The images are a writable copy, free of the table's memory.
    """
    sample_ids = table[schema.SAMPLE_ID].to_pylist()
    media, stages = table[schema.MEDIA].to_pylist(), table[schema.STAGE].to_pylist()
    classes, messages = table[schema.ERROR_CLASS].to_pylist(), table[schema.MESSAGE].to_pylist()
    tries = table[schema.TRIES].to_pylist()
    failures = [
        Failure(sample_ids[row], media[row], stages[row], classes[row], messages[row], tries[row])
        for row in range(len(sample_ids))
        if stages[row] is not None
    ]
    audio, audio_valid = unpack_audio(table)
    is_valid = [bool(name) and stage is None for name, stage in zip(sample_ids, stages, strict=True)]
    return SampleBatch(
        step=table[STEP][0].as_py(),
        rank=table[RANK][0].as_py(),
        sample_ids=sample_ids,
        captions=table[schema.CAPTION].to_pylist(),
        instructions=table[schema.INSTRUCTION].to_pylist(),
        image_ids=np.array(table[IMAGE_ID].to_numpy(), dtype=np.int64),
        is_valid=np.array(is_valid, dtype=np.bool_),
        images=_images(table),
        frame_valid=np.array(table[_FRAME_VALID].to_pylist(), dtype=np.bool_),
        failures=failures,
        audio=audio,
        audio_valid=audio_valid,
        costs=sum_costs(table),
    )


def _images(table: pa.Table) -> NDArray[Any]:
    chunks = []
    for chunk in table[_VALUES].chunks:
        _, offsets, content = chunk.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        chunks.append(np.frombuffer(content, dtype=np.uint8)[bounds[0] : bounds[-1]])
    codec = table[_CODEC][0].as_py()
    raw = np.concatenate(chunks).view(_raw_dtype(codec)).reshape(len(table), *table[_SHAPE][0].as_py())
    return raw if codec == PIXELS else decode_tokens(raw, codec)


def _raw_dtype(codec: Literal["pixels"] | TokenDtype) -> np.dtype[Any]:
    return np.dtype(np.uint8) if codec == PIXELS else RAW_DTYPES[codec]


_PASSED_COLUMNS = (STEP, RANK, schema.SAMPLE_ID, schema.MEDIA, schema.CAPTION, schema.INSTRUCTION, IMAGE_ID)
_PACKED_SCHEMA = pa.schema(
    [
        (STEP, pa.int64()),
        (RANK, pa.int32()),
        (schema.SAMPLE_ID, pa.string()),
        (schema.MEDIA, pa.string()),
        (schema.CAPTION, pa.string()),
        (schema.INSTRUCTION, pa.string()),
        (IMAGE_ID, pa.int64()),
        (schema.STAGE, pa.string()),
        (schema.ERROR_CLASS, pa.string()),
        (schema.MESSAGE, pa.string()),
        (schema.TRIES, pa.int32()),
        *COST_COLUMNS.items(),
        (_CODEC, pa.string()),
        (_SHAPE, pa.list_(pa.int32())),
        (_FRAME_VALID, pa.list_(pa.bool_())),
        (_VALUES, pa.large_binary()),
    ]
)
