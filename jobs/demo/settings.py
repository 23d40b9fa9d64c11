"""Settings of the demo."""

from dataclasses import dataclass

from pydantic import Field

from jobs.settings.data import RaySettings, Settings
from qformer.config import QFormerSizes


class WorldSettings(Settings):
    """Size of the synthetic corpus."""

    num_images: int = Field(default=4800, ge=100)
    num_clips: int = Field(default=2000, ge=50)
    num_test_images: int = Field(default=300, ge=200)
    num_test_clips: int = Field(default=128, ge=64)
    seed: int = 0


class StageSettings(Settings):
    """Training of one stage."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    learning_rate: float = Field(gt=0)


class Stage1Settings(StageSettings):
    """Training of stage 1, on images alone: its objectives ignore time."""

    steps: int = Field(default=460, gt=0)
    batch_size: int = Field(default=64, gt=1)
    learning_rate: float = Field(default=3e-3, gt=0)


class Stage2Settings(StageSettings):
    """Training of stage 2, on images and clips. Many small steps, because motions are learnt last."""

    steps: int = Field(default=1100, gt=0)
    batch_size: int = Field(default=32, gt=1)
    learning_rate: float = Field(default=2e-3, gt=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoQFormerSizes(QFormerSizes):
    """A Q-Former small enough to learn the synthetic corpus in minutes on two cores."""

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 192
    num_queries: int = 8
    embed_dim: int = 64
    dropout: float = 0.0


class ClipWorldSettings(Settings):
    """Size of the clip corpus."""

    num_clips: int = Field(default=3000, ge=20)
    num_test_clips: int = Field(default=320, ge=20, multiple_of=2)
    """Number of test clips; half of them are the reversals of the others."""
    seed: int = 0
    broken_share: float = Field(default=0.01, ge=0, lt=0.5)


class ClipTrainingSettings(Settings):
    """Training of one bridge."""

    steps: int = Field(default=1000, gt=0)
    """Steps of bridges that read the order; which of two things comes first is learnt last."""
    baseline_steps: int = Field(default=800, gt=0)
    """Steps of mean pooling, which cannot learn the order; fewer steps are too few for the rest."""
    sound_steps: int = Field(default=400, gt=0)
    """Further steps of a bridge with an audio branch."""
    batch_size: int = Field(default=32, gt=1)
    learning_rate: float = Field(default=3e-3, gt=0)


class ClipQuerySettings(Settings):
    """Number of queries of the bridges; widths are those of the image demo."""

    cascaded: int = Field(default=8, ge=1)
    spatial: int = Field(default=8, ge=1)
    temporal: int = Field(default=8, ge=1)
    audio: int = Field(default=4, ge=1)


class ClipDemoSettings(Settings):
    """Video part of the demo (`demo.video`): clips whose captions need the order of frames, and sound."""

    world: ClipWorldSettings = ClipWorldSettings()
    training: ClipTrainingSettings = ClipTrainingSettings()
    queries: ClipQuerySettings = ClipQuerySettings()


class DemoOptions(Settings):
    """Options of the demo."""

    output: str = "demo-out"
    video: bool = False
    """Also run the video part: clips whose captions need the order of their frames, and sound."""
    retrain: bool = False
    """Train, evaluate and serve again, on the same corpus."""
    world: WorldSettings = WorldSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: Stage2Settings = Stage2Settings()
    qformer: DemoQFormerSizes = DemoQFormerSizes()
    clips: ClipDemoSettings = ClipDemoSettings()
    workers: int = Field(default=2, ge=1)
    min_whole_caption: float | None = None
    """Bar on whole-caption accuracy; null prints it without one."""
    port: int = Field(default=8000, ge=1, le=65535)


class DemoSettings(Settings):
    """`qformer demo`: run all jobs on a synthetic corpus whose captions can be checked automatically."""

    demo: DemoOptions = DemoOptions()
    ray: RaySettings = RaySettings()
