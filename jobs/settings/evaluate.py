"""Settings of the jobs that use a trained checkpoint: `qformer evaluate`, `doctor` and `caption`."""

from pydantic import Field, model_validator

from jobs.settings.data import DataSettings, RaySettings, Settings
from pipelines.data.media.samples import Limits
from qformer.config import GenerationSettings


class EvaluateSettings(Settings):
    """`qformer evaluate`: retrieval with a stage-1 checkpoint, captions with a stage-2 one."""

    checkpoint: str
    """Run folder (its newest checkpoint) or one checkpoint folder."""
    data: DataSettings
    output: str
    """Folder for the summary and the results of each row."""
    batch_size: int = Field(default=64, gt=0)
    rerank_top_k: int = Field(default=32, ge=0)
    """Candidates per query that the ITM head scores again; 0 ranks by ITC alone."""
    generation: GenerationSettings = GenerationSettings()
    workers: int = Field(default=1, ge=1)
    """Model actors."""
    decode_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    ray: RaySettings = RaySettings()


class DoctorSettings(Settings):
    """`qformer doctor`: check whether a run's model uses its images, and report problems of the run."""

    run: str
    """Run folder of `qformer train`, local path or fsspec URI."""
    data: DataSettings | None = None
    """Rows to test on; null: the run's validation rows, else those of its manifest's split val, validation, dev or
    test, else its training rows."""
    rows: int = Field(default=256, ge=16)
    """Number of rows, chosen at random."""
    batch_size: int = Field(default=32, ge=2, le=256)
    """Images are exchanged within a batch."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the choice of rows and of the exchange of images."""
    use_gpu: bool | None = None
    """Whether to run on a GPU; null: if there is one."""
    output: str | None = None
    """Folder for doctor.json; null: the run folder."""


class EngineSettings(Settings):
    """Size of the batch that generates."""

    max_requests: int = Field(default=32, ge=1)
    """Most texts that are generated together."""
    kv_tokens: int = Field(default=16_384, ge=1)
    """Tokens in the key-value cache: running texts times the longest one's length, prompt included."""


class CaptionSettings(Settings):
    """`qformer caption`: caption files, or every row of a manifest, with a stage-2 checkpoint."""

    checkpoint: str
    """Run folder (its newest checkpoint) or one checkpoint folder, of stage 2."""
    media: list[str] = []
    """Files to caption; give these or `manifest`."""
    manifest: str | None = None
    """Manifest whose rows are captioned, or whose questions are answered; see `data.manifest` of `qformer evaluate`."""
    split: str | None = None
    """Split of the manifest; null: all rows."""
    output: str | None = None
    """Folder for a manifest's captions. A second run adds only missing rows."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames sampled from a video; null: as in training."""
    instruction: str = ""
    """Question or instruction for every file; empty: that of the manifest's row, else the prompt of training."""
    generation: GenerationSettings = GenerationSettings()
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    """Batch of each model actor, for a manifest."""
    workers: int = Field(default=1, ge=1)
    """Model actors for a manifest."""
    decode_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a manifest's rows that may be quarantined; the job stops above it."""
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _check(self) -> "CaptionSettings":
        if bool(self.media) == (self.manifest is not None):
            raise ValueError("give either media (files) or manifest (a corpus)")
        if (self.output is None) != (self.manifest is None):
            raise ValueError("manifest and output belong together: give both, or neither with media")
        return self
