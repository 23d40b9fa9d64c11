"""Column names and types of the tables; no other module spells a column."""

import pyarrow as pa

SAMPLE_ID = "sample_id"
MEDIA = "media"
MEDIA_BYTES = "media_bytes"
KIND = "kind"
CAPTIONS = "captions"
INSTRUCTIONS = "instructions"
"""Questions or prompts that the captions answer: one for all, one for each, or none to use the run's own prompt."""
START_S = "start_s"
END_S = "end_s"
SPLIT = "split"
LICENCE = "licence"
SOURCE = "source"
"""Name of the source of a row."""

CAPTION = "caption"
"""Accepted in place of `captions` when a table has one caption a row."""
INSTRUCTION = "instruction"
"""Accepted in place of `instructions`."""
SINGULAR = {CAPTION: CAPTIONS, INSTRUCTION: INSTRUCTIONS}

IMAGE = "image"
VIDEO = "video"
KINDS = (IMAGE, VIDEO)
TRAIN = "train"
"""Split of the training rows; every other one is for evaluation."""

FEATURE_SHARD, FEATURE_ROW = FEATURE_COLUMNS = ("feature_shard", "feature_row")
"""Location of a row's features in a feature cache; only in tables from `features.cache.locate`."""

STAGE = "stage"
ERROR_CLASS = "error_class"
MESSAGE = "message"
TRIES = "tries"
EPOCH = "epoch"

SIZE_BYTES = "size_bytes"
CONTENT_HASH = "content_hash"
CODEC = "codec"
WIDTH = "width"
HEIGHT = "height"
DURATION_S = "duration_s"
FPS = "fps"
NUM_FRAMES = "num_frames"
ROTATION_DEG = "rotation_deg"
HAS_AUDIO = "has_audio"

FACTS_SCHEMA = pa.schema(
    [
        pa.field(SIZE_BYTES, pa.int64()),
        pa.field(CONTENT_HASH, pa.string()),
        pa.field(CODEC, pa.string()),
        pa.field(WIDTH, pa.int32()),
        pa.field(HEIGHT, pa.int32()),
        pa.field(DURATION_S, pa.float64()),
        pa.field(FPS, pa.float64()),
        pa.field(NUM_FRAMES, pa.int32()),
        pa.field(ROTATION_DEG, pa.int32()),
        pa.field(HAS_AUDIO, pa.bool_()),
    ]
)
"""Columns of `decode_rows.CheckRows` about each file, besides its error; see `facts.MediaFacts`."""

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field(SAMPLE_ID, pa.string(), nullable=False),
        pa.field(MEDIA, pa.string()),
        pa.field(MEDIA_BYTES, pa.large_binary()),
        pa.field(KIND, pa.string(), nullable=False),
        pa.field(CAPTIONS, pa.list_(pa.string()), nullable=False),
        pa.field(INSTRUCTIONS, pa.list_(pa.string()), nullable=False),
        pa.field(START_S, pa.float64()),
        pa.field(END_S, pa.float64()),
        pa.field(SPLIT, pa.string(), nullable=False),
        pa.field(LICENCE, pa.string()),
        pa.field(SOURCE, pa.string()),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field(SAMPLE_ID, pa.string(), nullable=False),
        pa.field(MEDIA, pa.string()),
        pa.field(STAGE, pa.string(), nullable=False),
        pa.field(ERROR_CLASS, pa.string(), nullable=False),
        pa.field(MESSAGE, pa.string(), nullable=False),
        pa.field(TRIES, pa.int32(), nullable=False),
        pa.field(EPOCH, pa.int32(), nullable=False),
    ]
)

PROBE_SCHEMA = pa.schema(
    [
        *(MANIFEST_SCHEMA.field(name) for name in (SAMPLE_ID, MEDIA, KIND, SPLIT, SOURCE, START_S, END_S)),
        *FACTS_SCHEMA,
    ]
)
"""Table of `prepare` about the files: one row for each row of the manifest."""

DUPLICATE_OF, DUPLICATE_OF_SPLIT = "duplicate_of", "duplicate_of_split"

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field(SAMPLE_ID, pa.string(), nullable=False),
        pa.field(SPLIT, pa.string(), nullable=False),
        pa.field(MEDIA, pa.string()),
        pa.field(DUPLICATE_OF, pa.string(), nullable=False),
        pa.field(DUPLICATE_OF_SPLIT, pa.string(), nullable=False),
        pa.field(CONTENT_HASH, pa.string(), nullable=False),
    ]
)
"""Rows whose media has the same bytes as another file of an earlier row, or as media of another split."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field(KIND, pa.string(), nullable=False),
        pa.field(SPLIT, pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
    ]
)
"""The part files of a manifest too large for one file."""
