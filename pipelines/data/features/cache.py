"""Reading of a feature cache in place of pixels; `files` describes its layout."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data import schema, storage
from pipelines.data.batches.audio_rows import AudioRows
from pipelines.data.batches.batch import IMAGE_ID, ImageRows, pack
from pipelines.data.batches.plan import image_ids
from pipelines.data.batches.token_codec import RAW_DTYPES
from pipelines.data.failures import Failure, MediaError
from pipelines.data.features.files import (
    AUDIO,
    AUDIO_VALID,
    FAILURE_COLUMNS,
    INDEX_FILE,
    SOURCE,
    open_shard,
    read_table,
)
from pipelines.data.features.spec import FeatureSpec, read_spec
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.storage.retries import with_retries
from qformer.errors import UserError

_OPEN_SHARDS = 64
_REENCODED = "only the shards whose rows changed or moved"


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """A finished cache that can be read."""

    folder: str
    spec: FeatureSpec
    is_random: bool = False
    """False: cached features are of images without augmentation and of frames chosen without a seed."""

    def row_bytes(self, kind: str) -> int:
        """Bytes of one sample."""
        return self.spec.row_bytes(kind)

    def without_audio(self) -> "FeatureCache":
        """The same cache without its audio vectors."""
        return dataclasses.replace(self, spec=self.spec.without_audio())


def open_cache(folder: str) -> FeatureCache:
    """Open a finished cache.

    Raises:
        UserError: If there is none, or it is unfinished or of another format.
    """
    spec = read_spec(folder)
    if spec is None or not storage.exists(storage.join(folder, INDEX_FILE)):
        what = "is not finished" if spec else "holds no feature cache"
        raise UserError(f"data.features={folder} {what}; run `qformer features --set output={folder}` first")
    return FeatureCache(folder, spec)


def locate(manifest: pa.Table, cache: FeatureCache) -> pa.Table:
    """Add the location of its features to each manifest row.

    Raises:
        UserError: If the cache lacks a row, or has it for another file or clip.
    """
    index = read_table(storage.join(cache.folder, INDEX_FILE))
    places = pc.index_in(manifest[schema.SAMPLE_ID], value_set=index[schema.SAMPLE_ID])
    advice = f"run `qformer features --set output={cache.folder}` over this manifest; it encodes {_REENCODED}"
    if places.null_count:
        missing = manifest.filter(pc.is_null(places))[schema.SAMPLE_ID]
        raise UserError(
            f"feature cache {cache.folder} lacks {len(missing)} rows, {missing[0].as_py()!r} first; {advice}"
        )
    found = index.take(places)
    moved = np.flatnonzero(found[SOURCE].to_numpy() != np.asarray(image_ids(manifest), dtype=np.int64))
    if len(moved):
        name = manifest[schema.SAMPLE_ID][int(moved[0])].as_py()
        raise UserError(
            f"feature cache {cache.folder} was made of other files for {len(moved)} rows, {name!r} first; {advice}"
        )
    for column in (schema.FEATURE_SHARD, schema.FEATURE_ROW):
        manifest = manifest.append_column(column, found[column])
    return manifest


class ReadFeatures:
    """Reads a block of located rows into `batch.pack`'s table; replaces `DecodeRows` for a cache.

    Args:
        cache: Cache to read.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._spec, self._folder = cache.spec, cache.folder
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(functools.partial(open_shard, cache.folder))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Read a block; rows whose decoding failed come back with their failure and zero tokens."""
        images = ImageRows([self._spec.raw_shape(kind) for kind in rows[schema.KIND].to_pylist()], self._spec.dtype)
        spec = self._spec
        audio = (
            None if spec.audio is None else AudioRows(len(rows), spec.audio.num_segments, spec.audio_width, spec.dtype)
        )
        failures: list[Failure | None] = []
        costs = [StageCosts() for _ in range(len(rows))]
        names = (schema.SAMPLE_ID, schema.MEDIA, IMAGE_ID, *schema.FEATURE_COLUMNS)
        columns = [rows[name].to_pylist() for name in names]
        for row, (name, media, source, shard, place) in enumerate(zip(*columns, strict=True)):
            failure = None
            if name:
                with costs[row].measure("fetch"):
                    stored = self._stored(name, source, shard, place)
                if stored[schema.STAGE][0].is_valid:
                    failure = Failure(name, media, *(stored[column][0].as_py() for column in FAILURE_COLUMNS))
                else:
                    values = np.frombuffer(stored["tokens"][0].as_buffer(), dtype=RAW_DTYPES[self._spec.dtype])
                    with costs[row].measure("fetch"):  # a mapped file is read when its bytes are touched
                        images[row] = values.reshape(stored["shape"][0].as_py())
                    images.frame_valid[row] = stored["frame_valid"][0].as_py()
                    costs[row].fetched_bytes = values.nbytes
                    if audio is not None:
                        with costs[row].measure("fetch"):
                            audio[row] = self._vectors(stored), stored[AUDIO_VALID][0].as_py()
            failures.append(failure)
        return pack(rows, images, failures, costs, audio)

    def _vectors(self, stored: pa.RecordBatch) -> NDArray[Any]:
        raw = np.frombuffer(stored[AUDIO][0].as_buffer(), dtype=RAW_DTYPES[self._spec.dtype])
        return raw.reshape(-1, self._spec.raw_audio_width)

    def _batch(self, shard: int, place: int) -> pa.RecordBatch:
        try:
            return self._shard(shard).get_batch(place)
        except (FileNotFoundError, ValueError, IndexError) as error:
            raise MediaError("missing", str(error), stage="read") from error
        except Exception:
            self._shard.cache_clear()  # the state of the file is unknown
            raise

    def _stored(self, name: str, source: int, shard: int, place: int) -> pa.RecordBatch:
        """The record batch of a row.

        Raises:
            UserError: If it is missing, or belongs to another row: the cache was changed after the start of training.
        """
        location = f"feature cache {self._folder}, shard {shard}, row {place}"
        advice = (
            "the cache was changed or damaged; stop the process that writes it, run `qformer features "
            f"--set output={self._folder}` over this manifest, and resume"
        )
        try:
            stored = with_retries(self._folder, lambda: self._batch(shard, place))
        except MediaError as error:
            what = "is missing" if error.error_class == "missing" else "cannot be read"
            raise UserError(f"{location}: sample {name!r} {what} ({error.message[:100]}); {advice}") from error
        # In a mixture, sample ids have the source's name as a prefix.
        own = stored[schema.SAMPLE_ID][0].as_py()
        if stored[SOURCE][0].as_py() != source or not (name == own or name.endswith(f"/{own}")):
            raise UserError(f"{location} is {own!r} of other media, not sample {name!r}; {advice}")
        return stored
