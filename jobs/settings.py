"""Settings of every job: pydantic v2 models, frozen, unknown keys refused with the nearest valid key."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.data.sampling import Sampling
from qformer.config import GenerationSettings, LoraConfig, QFormerConfig

Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


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
    video_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of one clip's decoding; the decoding child is killed after it."""
    video_memory_bytes: int = Field(default=4 * 1024**3, gt=0)


class ServingLimitSettings(LimitSettings):
    """As `LimitSettings`, with a deadline that a waiting client can bear."""

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


class PixelSettings(Settings):
    """Which rows of a manifest to take, and how they become pixels."""

    split: str = "train"
    kind: Literal["image", "video"] | None = None
    """Take only images, or only videos; null takes both."""
    num_frames: int = Field(default=8, ge=1)
    """Frames sampled from a video; an image is one frame."""
    sampling: SamplingSettings = SamplingSettings()
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


class QFormerSettings(Settings):
    """The trainable bridge; widths of encoder and language model adapt by themselves."""

    hidden_size: int = Field(default=768, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=12, ge=1)
    intermediate_size: int = Field(default=3072, ge=1)
    num_queries: int = Field(default=32, ge=1)
    cross_attention_frequency: int = Field(default=2, ge=1)
    embed_dim: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    max_positions: int = Field(default=512, ge=1)
    """Text positions; as many as `model.qformer_init` has."""
    vision_norm_eps: float = Field(default=1e-5, gt=0)
    """Of the norm on the encoder's tokens; 1e-6 makes `qformer export` exact, 1e-5 is LAVIS'."""
    activation_checkpointing: bool = False
    """Less memory for about a third more work: layers are computed again in the backward pass."""

    @model_validator(mode="after")
    def _check(self) -> "QFormerSettings":
        QFormerConfig(encoder_width=1, **self.model_dump())
        return self


class ModelSettings(Settings):
    """Frozen backbones and the bridge between them."""

    vision: str
    """Vision encoder: timm name, Hugging Face name (owner/model), or local folder of either's files."""
    vision_pretrained: bool = True
    """false: random weights (for dry runs; a random encoder sees little)."""
    vision_layer: int = -2
    """Which block's output the Q-Former reads; -2 is the paper's second-to-last."""
    vision_image_size: int | None = Field(default=None, ge=1)
    """Side of the encoder's square input in pixels, its positions interpolated; null: the encoder's own."""
    language: str | None = None
    """Hugging Face language model for stage 2, decoder-only or T5: hub name or local folder."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of the Q-Former: hub name, local folder, or "corpus" to learn WordPiece from the captions. A
    stage 2 that reads prompts takes the one of `init_from` where that has one."""
    max_text_tokens: int = Field(default=32, ge=4)
    """Longest caption and longest prompt; longer ones lose their last words, and are counted."""
    prompt: str = ""
    """Text put before every caption in stage 2, not counted in the loss; rows with an instruction bring their own."""
    qformer_reads_prompt: bool = False
    """Stage 2: give prompt or instruction to the Q-Former as well as to the language model (InstructBLIP)."""
    lavis_reduction: bool = False
    """Stage 1: reduce over workers as LAVIS does: gathered features without gradient, ITG over own tokens."""
    freeze_qformer: bool = False
    """Stage 2: train the projection to the language model alone (MiniGPT-4); needs `init_from`."""
    lora: LoraConfig | None = None
    """Stage 2: also train low-rank updates of the language model; null: it stays as it is."""
    qformer: QFormerSettings = QFormerSettings()
    qformer_init: str | None = None
    """Hugging Face BERT that the Q-Former starts from (hub name or local folder); null: random weights."""
    init_mismatch: Literal["refuse", "reinitialise"] = "refuse"
    """What becomes of tensors that do not fit on starting from `qformer_init` or `init_from`."""


class OptimSettings(Settings):
    """AdamW with warm-up and cosine (BLIP-2, section 3.4)."""

    learning_rate: float = Field(default=1e-4, gt=0)
    min_learning_rate: float = Field(default=1e-5, ge=0)
    warmup_steps: int = Field(default=2000, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: Decay | None = None
    """Save an exponential moving average of the weights in their place, e.g. 0.999; null: the weights themselves."""


class TrainSettings(Settings):
    """`qformer train`: one stage of training into one run folder."""

    output: str
    """Run folder (local path or fsspec URI): settings, checkpoints, metrics, quarantine, TensorBoard."""
    stage: Literal[1, 2]
    init_from: str | None = None
    """Run folder or checkpoint whose Q-Former starts this stage (stage 2 from stage 1, or from another stage 2)."""
    resume: bool = False
    """Continue from the newest checkpoint in `output`."""
    model: ModelSettings
    data: TrainDataSettings
    optim: OptimSettings = OptimSettings()
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Global batch: samples of one optimizer step over all workers."""
    workers: int = Field(default=1, ge=1)
    use_gpu: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Compile the Q-Former's layers (torch.compile): faster steps on a GPU, after minutes of compiling."""
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=3, ge=1)
    """Newest checkpoints that stay; older ones are removed when another is finished."""
    log_every: int = Field(default=10, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    max_failures: int = Field(default=0, ge=0)
    """How often Ray Train may restart the workers after a crash."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Steps without a finite gradient change nothing and are listed in bad_steps.jsonl; this many in a row end the run.
    """
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Training stops when more than this share of an epoch's rows is quarantined."""
    decode_workers: int = Field(default=1, ge=1)
    ray: RaySettings = RaySettings()


class PrepareSettings(Settings):
    """`qformer prepare`: check every row of the sources and write a manifest and a quarantine table."""

    sources: list[SourceSettings] = Field(min_length=1)
    output: str
    """Folder for manifest, quarantine.parquet, probe.parquet, duplicates.parquet and summary.json."""
    num_frames: int = Field(default=8, ge=1)
    limits: LimitSettings = LimitSettings()
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
    """`qformer features`: run the frozen encoder once over a manifest and keep what it sees."""

    output: str
    """Folder of the cache (local path or fsspec URI). A second run adds what is missing and leaves the rest."""
    vision: str
    """Vision encoder, as `model.vision` of `qformer train`."""
    vision_pretrained: bool = True
    vision_layer: int = -2
    vision_image_size: int | None = Field(default=None, ge=1)
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


class CaptionSettings(Settings):
    """`qformer caption`: caption files from the command line with a stage-2 checkpoint."""

    checkpoint: str
    media: list[str] = Field(min_length=1)
    num_frames: int | None = Field(default=None, ge=1)
    """null: as in training."""
    instruction: str = ""
    """Question or instruction about every file; empty: the prompt of training."""
    generation: GenerationSettings = GenerationSettings()
    limits: LimitSettings = LimitSettings()


class ServeSettings(Settings):
    """`qformer serve`: answer POST /v1/caption over HTTP."""

    checkpoint: str
    host: str = "127.0.0.1"
    """Loopback unless you mean to open the endpoint to the network."""
    port: int = Field(default=8000, ge=1, le=65535)
    max_body_bytes: int = Field(default=64 * 1024**2, gt=0)
    max_concurrent_requests: int = Field(default=32, ge=1)
    """Requests in work at a time; more are answered 503. Bounds the memory that bodies may take."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    generation: GenerationSettings = GenerationSettings()
    max_batch_size: int = Field(default=8, ge=1)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=2, ge=1)
    use_gpu: bool = False
    limits: ServingLimitSettings = ServingLimitSettings()
    ray: RaySettings = RaySettings()


class ImportSettings(Settings):
    """`qformer import`: a LAVIS file or a Hugging Face folder becomes a checkpoint."""

    source: str
    """LAVIS file (.pth or .safetensors), or local folder of Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval or InstructBlipForConditionalGeneration with its processor."""
    output: str
    """New local folder; `checkpoint=` of the other jobs takes it."""
    vision: str | None = None
    """Encoder of a LAVIS file, which holds none; a Hugging Face folder brings its own."""
    vision_pretrained: bool = True
    vision_layer: int = -2
    language: str | None = None
    """Language model of a LAVIS stage-2 file; a Hugging Face folder brings its own."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of a LAVIS stage-1 file."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a LAVIS Q-Former, which no tensor tells; null: 64 channels a head, as BERT."""
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
