"""Settings of `qformer prepare` and `qformer features`."""

from typing import Literal

from pydantic import Field

from jobs.settings.data import AudioSettings, DataSettings, RaySettings, Settings, SourceSettings
from jobs.settings.specs import Audio, Vision
from pipelines.data.media.samples import Limits


class PrepareSettings(Settings):
    """`qformer prepare`: check every row of the sources and write a manifest and a quarantine table."""

    sources: list[SourceSettings] = Field(min_length=1)
    """Places that rows come from, such as sources.0.path."""
    output: str
    """Folder for manifest, quarantine.parquet, probe.parquet, duplicates.parquet and summary.json."""
    num_frames: int = Field(default=8, ge=1)
    audio: AudioSettings | None = None
    """Segments of the videos' sound to check too, as training with `model.audio` reads them; null: pictures alone."""
    limits: Limits = Limits()
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Share of quarantined rows above which the summary warns; the exit code stays 0."""
    drop_training_duplicates: bool = False
    """Quarantine training rows whose media has the same bytes as an evaluation row's; false only warns."""
    dry_run: int = Field(default=0, ge=0)
    """Number of random rows of each source to check without writing anything; 0: the real run."""
    retry_quarantined: bool = False
    """Try the quarantined files of `output` again and move those that can be read now into the manifest."""
    decode_workers: int = Field(default=2, ge=1)
    ray: RaySettings = RaySettings()


class FeaturesSettings(Settings):
    """`qformer features`: run the frozen encoders once over a manifest and store their outputs."""

    output: str
    """Folder of the cache (local path or fsspec URI). A second run adds only missing rows."""
    vision: Vision
    """Vision encoder, as `model.vision` of `qformer train`; a string alone is its name."""
    audio: Audio | None = None
    """Audio encoder, as `model.audio` of `qformer train`, whose vectors are stored as well; null: no sound."""
    data: DataSettings
    dtype: Literal["fp16", "bf16", "int8"] = "fp16"
    """Storage type of tokens; int8 has one scale a token and half the size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder."""
    frames_per_pass: int = Field(default=64, gt=0)
    """Frames that one actor encodes at a time."""
    workers: int = Field(default=1, ge=1)
    """Encoder actors."""
    decode_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of rows that may be quarantined; the job stops above it, and its table and shards stay."""
    ray: RaySettings = RaySettings()
