"""Settings that several jobs share: the base of all, sources and rows, limits, the cluster."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.clip import MAX_DURATION_S
from pipelines.data.media.frame_sampling import Sampling

_HIGHEST_RATE_HZ = 48_000
"""Of audio encoders: what fits into memory at this rate does so at every other."""
Share = Annotated[float, Field(gt=0, le=1)]


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
    """auto tells by the name, and by what JSON and CSV files hold."""
    columns: dict[str, str] = {}
    """Our column name -> the table's own, e.g. {media: image}; of tar shards a member's extension or a key of the
    .json member. A missing sample_id becomes the media path."""
    media_root: str = ""
    """Folder that relative media paths start from, when it is not the table's own; they may not leave it."""
    kind: Literal["auto", "image", "video"] = "auto"
    split: str = "train"
    """Split of rows that name none. All splits but "train" are for evaluation."""
    name: str = ""
    """What the column `source` says of its rows; "" for the last part of the path."""


class LimitSettings(Settings):
    """What one media file may cost before it is quarantined as `too_large` or `timeout`."""

    max_bytes: int = Field(default=2 * 1024**3, gt=0)
    """Of an image, and of a video that is fetched (from a store, a tar shard, a table): it is held in memory."""
    max_video_bytes: int = Field(default=1024**4, gt=0)
    """Of a video on a local disk, which is read in place."""
    max_pixels: int = Field(default=90_000_000, gt=0)
    """Width x height of an image or frame."""
    max_duration_s: float = Field(default=MAX_DURATION_S, gt=0)
    """Of a video, by the times of its frames."""
    video_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of one clip's decoding; the decoding child is killed after it."""
    video_memory_bytes: int = Field(default=4 * 1024**3, gt=0)


class ServingLimitSettings(LimitSettings):
    """As `LimitSettings`, with a deadline that a waiting client can bear."""

    max_duration_s: float = Field(default=3600.0, gt=0)
    """Of a video, by the times of its frames."""
    video_timeout_s: float = Field(default=10.0, gt=0)


class RaySettings(Settings):
    """The cluster a job runs on."""

    address: str | None = None
    """Address of a running cluster; null takes the environment's RAY_ADDRESS, else starts a cluster here."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a cluster started here; null: all, at least 4, lest training starve decoding."""


class AugmentationSettings(Settings):
    """Random changes of training images, keyed by (seed, epoch, sample id)."""

    random_resized_crop: bool = False
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    """Smallest and largest share of the image's area kept by the crop."""
    horizontal_flip: bool = False
    """Off by default: a flip makes "left" and "right" in captions false."""


class SamplingSettings(Settings):
    """Which frames of a video are looked at. What is random is so in training alone, keyed by (seed, epoch, sample id).

    Evaluation and serving take the same strategy without chance.
    """

    strategy: Literal["uniform", "random_segment", "head_tail", "fps", "key_frames", "times"] = "uniform"
    """uniform: centres of equal segments. random_segment: a random moment of each (TSN). head_tail: half of the frames
    at random moments of the first half, the rest of the second (Video-LLaMA). fps: uniform, at most `fps` a second.
    key_frames: those of the codec, cheapest to decode. times: at `times_s`."""
    fps: float | None = Field(default=None, gt=0)
    """Of the strategy fps."""
    times_s: tuple[float, ...] = ()
    """Of the strategy times: ascending seconds after the clip's start."""

    @model_validator(mode="after")
    def _check(self) -> "SamplingSettings":
        self.build()
        return self

    def build(self) -> Sampling:
        """What the data plane takes."""
        return Sampling(**self.model_dump())


class AudioSettings(Settings):
    """Which segments of a video's sound are listened to, where there is an audio encoder.

    They are evenly spread over the clip: the first begins with it, the last ends with it.
    """

    num_segments: int = Field(default=8, ge=1)
    segment_s: float = Field(default=2.0, gt=0)
    """Length of each in seconds; 8 of 2 s are Video-LLaMA's."""

    @model_validator(mode="after")
    def _check(self) -> "AudioSettings":
        self.build(_HIGHEST_RATE_HZ)
        return self

    def build(self, sample_rate_hz: int) -> AudioSampling:
        """What the data plane takes.

        Args:
            sample_rate_hz: Of the audio encoder.
        """
        return AudioSampling(sample_rate_hz=sample_rate_hz, **self.model_dump())


class PixelSettings(Settings):
    """Which rows of a manifest to take, and how they become pixels and sound."""

    split: str = "train"
    kind: Literal["image", "video"] | None = None
    """Take only images, or only videos; null takes both."""
    num_frames: int = Field(default=8, ge=1)
    """Frames sampled from a video; an image is one frame."""
    sampling: SamplingSettings = SamplingSettings()
    audio: AudioSettings = AudioSettings()
    limits: LimitSettings = LimitSettings()


class DataSettings(PixelSettings):
    """Rows to read and how they become pixels."""

    manifest: str
    """A manifest as `qformer prepare` writes it, or any table with its columns."""


class ManifestSettings(Settings):
    """One manifest of a mixture."""

    path: str
    """As `data.manifest` of one manifest."""
    weight: float | None = Field(default=None, gt=0)
    """Rows of an epoch in proportion to the other manifests' weights; for `mixture: explicit` alone."""


class TrainDataSettings(PixelSettings):
    """Rows to train on."""

    manifest: str | list[ManifestSettings] = Field(min_length=1)
    """A manifest as `qformer prepare` writes it, or any table with its columns; or a list of several, with `path` and
    `weight`. The sample ids of several get the last parts of their manifest's path in front."""
    mixture: Literal["proportional", "sqrt", "explicit"] = "proportional"
    """How many rows of each manifest an epoch takes, which is as long as all manifests together: every row once; in
    proportion to the square root of their rows; or to the weights. A manifest drawn less goes on in the next epoch
    where it stopped; rows of one drawn more come again, after all its others came."""
    features: str | None = None
    """Folder of a feature cache (`qformer features`) to train on in place of pixels; fixes crop and frames."""
    augmentation: AugmentationSettings = AugmentationSettings()
