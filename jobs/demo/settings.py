"""Settings of the demo."""

from pydantic import Field

from jobs.settings import QFormerSettings, RaySettings, Settings


class WorldSettings(Settings):
    """How large a world to write."""

    num_images: int = Field(default=4000, ge=100)
    num_clips: int = Field(default=1000, ge=50)
    num_test_images: int = Field(default=300, ge=200)
    num_test_clips: int = Field(default=128, ge=64)
    seed: int = 0


class StageSettings(Settings):
    """How long and how fast one stage trains."""

    steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)


class DemoOptions(Settings):
    """What the demo does."""

    output: str = "demo-out"
    retrain: bool = False
    """Train, evaluate and serve again, on the same world."""
    world: WorldSettings = WorldSettings()
    stage1: StageSettings = StageSettings(steps=400, learning_rate=1e-3)
    stage2: StageSettings = StageSettings(steps=400, learning_rate=1e-3)
    qformer: QFormerSettings = QFormerSettings(
        hidden_size=96, num_layers=4, num_heads=4, intermediate_size=192, num_queries=8, embed_dim=64, dropout=0.0
    )
    batch_size: int = Field(default=64, gt=1)
    workers: int = Field(default=2, ge=1)
    min_whole_caption: float | None = None
    """Bar on whole-caption accuracy; null prints it without one."""
    port: int = Field(default=8000, ge=1, le=65535)


class DemoSettings(Settings):
    """`qformer demo`: the whole road on a small world whose captions can be checked."""

    demo: DemoOptions = DemoOptions()
    ray: RaySettings = RaySettings()
