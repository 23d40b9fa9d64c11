"""Settings of every job: pydantic v2 models, frozen, unknown keys refused with the nearest valid key."""

from typing import Literal

from pydantic import Field, model_validator

from jobs.settings.data import (
    AudioSettings,
    DataSettings,
    RaySettings,
    Settings,
    SourceSettings,
    TrainDataSettings,
)
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.serve import ServeSettings as ServeSettings
from jobs.settings.specs import Audio, Language, Vision
from pipelines.data.media.samples import Limits
from qformer.config import GenerationSettings


class ValidationSettings(Settings):
    """Losses over an evaluation set as training goes on; best.json names the best checkpoint, which is kept."""

    manifest: str | None = None
    """null: that of `data`."""
    split: str = "val"
    every: int = Field(gt=0)
    """Steps between validations; each is a checkpoint too."""
    features: str | None = None
    """Feature cache of its rows; where `data.features` is set, and only there."""
    patience: int | None = Field(default=None, ge=1)
    """End the training after so many validations in a row without a lower loss; null: never."""


class TrainSettings(Settings):
    """`qformer train`: one stage of training into one run folder."""

    output: str
    """Run folder (local path or fsspec URI): settings, checkpoints, metrics, quarantine, TensorBoard."""
    stage: Literal[1, 2]
    """1: contrast, match and generate beside the frozen encoder; 2: prompt a frozen language model."""
    init_from: str | None = None
    """Run folder or checkpoint that this run starts from: of stage 1, or for stage 2 of either stage."""
    resume: bool = False
    """Continue from the newest checkpoint in `output`."""
    model: ModelSettings
    data: TrainDataSettings
    optim: OptimSettings = OptimSettings()
    steps: int = Field(gt=0)
    """Optimizer steps of the whole run; the learning rate falls to its minimum at the last."""
    batch_size: int = Field(gt=0)
    """Global batch: samples of one optimizer step over all workers."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Most samples that a worker keeps a graph of at a time; null: its whole share. Stage 1 computes a larger share
    twice (gradient caching), stage 2 adds gradients up; both get the gradient of the whole batch."""
    workers: int = Field(default=1, ge=1)
    """Training processes, one GPU each with `use_gpu`; they share `batch_size`."""
    min_workers: int | None = Field(default=None, ge=1)
    """Go on with so few when nodes are lost, and with more again, up to `workers`, when nodes come; batches, order and
    learning rates stay what they are. null: `workers` or none."""
    use_gpu: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the computations; the bridge's own weights are always fp32. fp16 scales its losses."""
    compile: bool = False
    """Compile the Q-Former's layers (torch.compile): faster steps on a GPU, after minutes of compiling."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints: as many are done again after a crash, at most."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Newest checkpoints that stay; older ones are removed when another is finished."""
    log_every: int = Field(default=10, gt=0)
    """Steps between records in metrics.jsonl, TensorBoard and Prometheus; 1 records every step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    max_failures: int | None = Field(default=None, ge=0)
    """How often Ray Train may restart the workers after a crash; null: 100 times with `min_workers`, else never."""
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """A step that takes longer has the stacks of all workers written to stacks/ in the run folder."""
    validation: ValidationSettings | None = None
    """null: no validation."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Steps without a finite gradient change nothing and are listed in bad_steps.jsonl; this many in a row end the run.
    """
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Training stops when more than this share of an epoch's rows is quarantined."""
    decode_workers: int = Field(default=1, ge=1)
    """Processes that fetch and decode for all workers, one CPU each."""
    ray: RaySettings = RaySettings()


class PrepareSettings(Settings):
    """`qformer prepare`: check every row of the sources and write a manifest and a quarantine table."""

    sources: list[SourceSettings] = Field(min_length=1)
    output: str
    """Folder for manifest, quarantine.parquet, probe.parquet, duplicates.parquet and summary.json."""
    num_frames: int = Field(default=8, ge=1)
    audio: AudioSettings | None = None
    """Try these segments of the videos' sound as well, as training with `model.audio` will; null: pictures alone."""
    limits: Limits = Limits()
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Above this share the summary warns; prepare itself still exits 0."""
    drop_training_duplicates: bool = False
    """Quarantine training rows whose media has the same bytes as an evaluation row's; false only warns."""
    dry_run: int = Field(default=0, ge=0)
    """Rows to try of each source, chosen at random, writing nothing; 0: the real run."""
    retry_quarantined: bool = False
    """Try the quarantined files of `output` again and move those that can be read now into the manifest."""
    decode_workers: int = Field(default=2, ge=1)
    ray: RaySettings = RaySettings()


class FeaturesSettings(Settings):
    """`qformer features`: run the frozen encoders once over a manifest and keep what they see and hear."""

    output: str
    """Folder of the cache (local path or fsspec URI). A second run adds what is missing and leaves the rest."""
    vision: Vision
    """Vision encoder, as `model.vision` of `qformer train`; a string alone is its name."""
    audio: Audio | None = None
    """Audio encoder, as `model.audio` of `qformer train`, whose vectors are stored as well; null: no sound."""
    data: DataSettings
    dtype: Literal["fp16", "bf16", "int8"] = "fp16"
    """How tokens are stored; int8 keeps one scale a token and halves the size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """How the encoder is run."""
    frames_per_pass: int = Field(default=64, gt=0)
    """Frames that one actor encodes at a time."""
    workers: int = Field(default=1, ge=1)
    """Encoder actors."""
    decode_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """The job stops when more than this share of the rows is quarantined; its table and what is encoded stay."""
    ray: RaySettings = RaySettings()


class EvaluateSettings(Settings):
    """`qformer evaluate`: retrieval with a stage-1 checkpoint, captions with a stage-2 one."""

    checkpoint: str
    """Run folder (its newest checkpoint) or one checkpoint folder."""
    data: DataSettings
    output: str
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
    """`qformer doctor`: whether a run's model uses its images, and what is odd in the run."""

    run: str
    """Run folder of `qformer train`, local path or fsspec URI."""
    data: DataSettings | None = None
    """Rows to look at; null: the run's own, of its validation, else of its manifest's split val, validation, dev or
    test, else those it was trained on."""
    rows: int = Field(default=256, ge=16)
    """How many of them, chosen at random."""
    batch_size: int = Field(default=32, ge=2, le=256)
    """Images are exchanged within a batch."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides which rows and which exchange."""
    use_gpu: bool | None = None
    """null: where there is one."""
    output: str | None = None
    """Folder for doctor.json; null: the run folder."""


class EngineSettings(Settings):
    """How much is generated at a time."""

    max_requests: int = Field(default=32, ge=1)
    """Texts that are generated together."""
    kv_tokens: int = Field(default=16_384, ge=1)
    """Tokens whose keys and values are kept: texts in work times the longest one's length, its prompt included."""


class CaptionSettings(Settings):
    """`qformer caption`: caption files, or every row of a manifest, with a stage-2 checkpoint."""

    checkpoint: str
    media: list[str] = []
    """Files to caption; either these or `manifest`."""
    manifest: str | None = None
    """A corpus to caption, or to answer the questions of: as `data.manifest` of `qformer evaluate`."""
    split: str | None = None
    """Split of the manifest; null: all its rows."""
    output: str | None = None
    """Folder for a manifest's captions. A second run adds what is missing and leaves the rest."""
    num_frames: int | None = Field(default=None, ge=1)
    """null: as in training."""
    instruction: str = ""
    """Question or instruction about every file; empty: that of the manifest's row, else the prompt of training."""
    generation: GenerationSettings = GenerationSettings()
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    """Generation engine of each model actor for a manifest."""
    workers: int = Field(default=1, ge=1)
    """Model actors for a manifest."""
    decode_workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """The job stops when more than this share of a manifest's rows is quarantined."""
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _check(self) -> "CaptionSettings":
        if bool(self.media) == (self.manifest is not None):
            raise ValueError("give either media (files) or manifest (a corpus)")
        if (self.output is None) != (self.manifest is None):
            raise ValueError("manifest and output belong together: give both, or neither with media")
        return self


class ImportSettings(Settings):
    """`qformer import`: a LAVIS file or a Hugging Face folder becomes a checkpoint."""

    source: str
    """LAVIS file (.pth or .safetensors), or local folder of Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval or InstructBlipForConditionalGeneration with its processor."""
    output: str
    """New local folder; `checkpoint=` of the other jobs takes it."""
    vision: Vision | None = None
    """Encoder of a LAVIS file, which holds none; a Hugging Face folder brings its own."""
    language: Language | None = None
    """Language model of a LAVIS stage-2 file; a Hugging Face folder brings its own."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of a LAVIS stage-1 file."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a LAVIS Q-Former, which no tensor shows; null: 64 channels a head, as BERT."""
    prompt: str = ""
    """Text put before every caption, as in the training of the imported model."""
    num_frames: int = Field(default=8, ge=1)
    """Frames that later jobs sample from a video."""
    max_text_tokens: int = Field(default=32, ge=4)
    allow_fresh: bool = False
    """Initialise tensors that the source lacks; false refuses it."""
    allow_unexpected: bool = False
    """Leave out tensors that we have no place for; false refuses it."""


class ExportSettings(Settings):
    """`qformer export`: a checkpoint becomes a folder for stock transformers."""

    checkpoint: str
    """Run folder (its newest checkpoint) or one checkpoint folder."""
    output: str
    """New local folder."""
