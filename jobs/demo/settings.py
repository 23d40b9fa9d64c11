"""Settings of the demo."""

from pydantic import Field

from jobs.settings.data import RaySettings, Settings
from jobs.settings.model import QFormerSettings


class WorldSettings(Settings):
    """How large a world to write."""

    num_images: int = Field(default=4800, ge=100)
    num_clips: int = Field(default=2000, ge=50)
    num_test_images: int = Field(default=300, ge=200)
    num_test_clips: int = Field(default=128, ge=64)
    seed: int = 0


class StageSettings(Settings):
    """How long and how fast one stage trains."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    learning_rate: float = Field(gt=0)


class Stage1Settings(StageSettings):
    """Stage 1 sees images alone: its objectives know no time."""

    steps: int = Field(default=460, gt=0)
    batch_size: int = Field(default=64, gt=1)
    learning_rate: float = Field(default=3e-3, gt=0)


class Stage2Settings(StageSettings):
    """Stage 2 sees images and clips. Many small steps: motions are learnt last."""

    steps: int = Field(default=1100, gt=0)
    batch_size: int = Field(default=32, gt=1)
    learning_rate: float = Field(default=2e-3, gt=0)


class DemoQFormerSettings(QFormerSettings):
    """A Q-Former small enough to learn the world in minutes on two cores."""

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 192
    num_queries: int = 8
    embed_dim: int = 64
    dropout: float = 0.0


class ClipWorldSettings(Settings):
    """How large a world of clips to write."""

    num_clips: int = Field(default=3000, ge=20)
    num_test_clips: int = Field(default=320, ge=20, multiple_of=2)
    """Half of them; every one is there backwards, too."""
    seed: int = 0
    broken_share: float = Field(default=0.01, ge=0, lt=0.5)


class ClipTrainingSettings(Settings):
    """How long and how fast one bridge trains."""

    steps: int = Field(default=1000, gt=0)
    """Which of two things came first is learnt last."""
    baseline_steps: int = Field(default=800, gt=0)
    """Of mean pooling, which no number of steps could teach the order; fewer do not teach it all of the rest."""
    sound_steps: int = Field(default=400, gt=0)
    """Further steps of a bridge that learns to hear."""
    batch_size: int = Field(default=32, gt=1)
    learning_rate: float = Field(default=3e-3, gt=0)


class ClipQuerySettings(Settings):
    """Queries of the bridges; widths are the image demo's."""

    cascaded: int = Field(default=8, ge=1)
    spatial: int = Field(default=8, ge=1)
    temporal: int = Field(default=8, ge=1)
    audio: int = Field(default=4, ge=1)


class ClipDemoSettings(Settings):
    """The demo's second part (`demo.video`): clips whose captions need order, and sound."""

    world: ClipWorldSettings = ClipWorldSettings()
    training: ClipTrainingSettings = ClipTrainingSettings()
    queries: ClipQuerySettings = ClipQuerySettings()


class DemoOptions(Settings):
    """What the demo does."""

    output: str = "demo-out"
    video: bool = False
    """After the images, also learn time and sound: clips whose captions need the order of their frames."""
    retrain: bool = False
    """Train, evaluate and serve again, on the same world."""
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
    """`qformer demo`: the whole road on a small world whose captions can be checked."""

    demo: DemoOptions = DemoOptions()
    ray: RaySettings = RaySettings()
