"""Settings that several jobs share: the base of all, sources and rows, limits, the cluster."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.data.media.audio_sampling import AudioSegments
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import Limits
from pipelines.data.media.transforms import Augmentation

_HIGHEST_RATE_HZ = 48_000
"""Highest sample rate of audio encoders: what fits into memory at this rate fits at every other."""


class Settings(BaseModel):
    """Base of all settings: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class SourceSettings(Settings):
    """One place rows come from."""

    path: str
    """File or folder, local path or fsspec URI (s3://bucket/…); of tar shards also a pattern shard-{000..127}.tar.
    Relative media paths are taken from this file's folder."""
    format: Literal[
        "auto", "parquet", "jsonl", "csv", "folder", "coco", "karpathy", "lavis", "webvid", "webdataset"
    ] = "auto"
    """auto decides by the name, and by the content of JSON and CSV files."""
    columns: dict[str, str] = {}
    """Our column name -> the table's own, e.g. {media: image}; of tar shards a member's extension or a key of the
    .json member. A missing sample_id becomes the media path."""
    media_root: str = ""
    """Folder that relative media paths start from, when it is not the table's own; they may not leave it."""
    kind: Literal["auto", "image", "video"] = "auto"
    split: str = "train"
    """Split of rows that name none. All splits but "train" are for evaluation."""
    name: str = ""
    """Value of the column `source` of its rows; "" for the last part of the path."""


class RaySettings(Settings):
    """The cluster a job runs on."""

    address: str | None = None
    """Address of a running cluster; null takes the environment's RAY_ADDRESS, else starts a cluster here."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a cluster started here; null: all, at least 4: with fewer, training waits for decoding."""


class AudioSettings(Settings):
    """Segments of a video's sound for the audio encoder.

    They are evenly spread over the clip: the first begins with it, the last ends with it.
    """

    num_segments: int = Field(default=AudioSegments().num_segments, ge=1)
    segment_s: float = Field(default=AudioSegments().segment_s, gt=0)
    """Length of each in seconds; 8 of 2 s are Video-LLaMA's."""

    @model_validator(mode="after")
    def _check(self) -> "AudioSettings":
        self.build().at(_HIGHEST_RATE_HZ)
        return self

    def build(self) -> AudioSegments:
        """The data plane's value of the same."""
        return AudioSegments(num_segments=self.num_segments, segment_s=self.segment_s)


class PixelSettings(Settings):
    """Rows of a manifest, and their decoding to pixels and sound."""

    split: str = "train"
    kind: Literal["image", "video"] | None = None
    """Take only images, or only videos; null takes both."""
    num_frames: int = Field(default=8, ge=1)
    """Frames sampled from a video; an image is one frame."""
    sampling: Sampling = Sampling()
    audio: AudioSettings = AudioSettings()
    limits: Limits = Limits()


class DataSettings(PixelSettings):
    """Rows to read and how they become pixels."""

    manifest: str
    """A manifest as `qformer prepare` writes it, or any table with its columns."""


class ManifestSettings(Settings):
    """One manifest of a mixture."""

    path: str
    """Manifest, written like `data.manifest`."""
    weight: float | None = Field(default=None, gt=0)
    """Rows of an epoch in proportion to the other manifests' weights; for `mixture: explicit` alone."""


class TrainDataSettings(PixelSettings):
    """Rows to train on."""

    manifest: str | list[ManifestSettings] = Field(min_length=1)
    """A manifest as `qformer prepare` writes it, or any table with its columns; or a list of several, with `path` and
    `weight`. The sample ids of several get the last parts of their manifest's path in front."""
    mixture: Literal["proportional", "sqrt", "explicit"] = "proportional"
    """Rows of each manifest in an epoch, which is as long as all manifests together: every row once; in
    proportion to the square root of their rows; or to the weights. A manifest drawn less goes on in the next epoch
    where it stopped; rows of one drawn more come again, after all its others came."""
    features: str | None = None
    """Folder of a feature cache (`qformer features`) to train on in place of pixels; fixes crop and frames."""
    augmentation: Augmentation = Augmentation()
