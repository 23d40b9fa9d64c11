"""Settings of the demo."""

from pydantic import Field

from jobs.demo.video.settings import ClipDemoSettings
from jobs.settings.data import RaySettings, Settings
from jobs.settings.model import QFormerSettings


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


class DemoQFormerSettings(QFormerSettings):
    """A Q-Former small enough to learn the synthetic corpus in minutes on two cores."""

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 192
    num_queries: int = 8
    embed_dim: int = 64
    dropout: float = 0.0


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
    qformer: DemoQFormerSettings = DemoQFormerSettings()
    clips: ClipDemoSettings = ClipDemoSettings()
    workers: int = Field(default=2, ge=1)
    min_whole_caption: float | None = None
    """Bar on whole-caption accuracy; null prints it without one."""
    port: int = Field(default=8000, ge=1, le=65535)


class DemoSettings(Settings):
    """`qformer demo`: run all jobs on a synthetic corpus whose captions can be checked automatically."""

    demo: DemoOptions = DemoOptions()
    ray: RaySettings = RaySettings()
