"""Settings of the video demo."""

from pydantic import Field

from jobs.settings.data import Settings


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
