"""Settings of `qformer train`."""

from typing import Literal

from pydantic import Field

from jobs.settings.data import RaySettings, Settings, TrainDataSettings
from jobs.settings.model import ModelSettings, OptimSettings


class ValidationSettings(Settings):
    """Losses over an evaluation set during training; best.json names the best checkpoint, which is never removed."""

    manifest: str | None = None
    """Manifest to validate on; null: that of `data`."""
    split: str = "val"
    every: int = Field(gt=0)
    """Steps between validations; each is a checkpoint too."""
    features: str | None = None
    """Feature cache of the validation rows; required with `data.features`, refused without."""
    patience: int | None = Field(default=None, ge=1)
    """Validations in a row without a lower loss that end the training; null: no end."""


class TrainSettings(Settings):
    """`qformer train`: one stage of training into one run folder."""

    output: str
    """Run folder (local path or fsspec URI): settings, checkpoints, metrics, quarantine, TensorBoard."""
    stage: Literal[1, 2]
    """1: contrast, match and generate with the frozen encoder; 2: prompt a frozen language model."""
    init_from: str | None = None
    """Run folder or checkpoint with the initial weights: of stage 1, or for stage 2 of either stage."""
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
    """Most samples with a graph at a time on one worker; null: its whole share. Stage 1 computes a larger share twice
    (gradient caching), stage 2 accumulates gradients; both get the gradient of the whole batch."""
    workers: int = Field(default=1, ge=1)
    """Training processes, one GPU each with `use_gpu`; they share `batch_size`."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers that training continues with after nodes are lost; it grows again, up to `workers`, when nodes are
    added. Batches, order and learning rates stay the same. null: always `workers`."""
    use_gpu: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the computations; the bridge's own weights are always fp32. fp16 scales its losses."""
    compile: bool = False
    """Compile the Q-Former's layers (torch.compile): faster steps on a GPU, after minutes of compiling."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints: at most as many are repeated after a crash."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Number of newest checkpoints; older ones are removed when another is finished."""
    log_every: int = Field(default=10, gt=0)
    """Steps between records in metrics.jsonl, TensorBoard and Prometheus; 1 records every step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    max_failures: int | None = Field(default=None, ge=0)
    """Most restarts of the workers after crashes; null: 100 with `min_workers`, else 0."""
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """Duration of a step after which the stacks of all workers are written to stacks/ in the run folder."""
    validation: ValidationSettings | None = None
    """Validation during training; null: none."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Steps in a row without a finite gradient that end the run; such steps change nothing and are listed in
    bad_steps.jsonl."""
    max_quarantine_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of an epoch's rows that may be quarantined; training stops above it."""
    decode_workers: int = Field(default=1, ge=1)
    """Processes that fetch and decode for all workers, one CPU each."""
    ray: RaySettings = RaySettings()
