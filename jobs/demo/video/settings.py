"""Settings of the video demo."""

from pydantic import Field

from jobs.settings.data import Settings


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
