"""The bridges that the video demo compares, and how each is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.demo.settings import DemoSettings
from jobs.demo.video.backbones.audio import NUM_SEGMENTS, SEGMENT_S
from jobs.demo.video.world.film import NUM_FRAMES
from jobs.settings.data import AudioSettings, TrainDataSettings
from jobs.settings.jobs import TrainSettings
from jobs.settings.model import AudioBranchSettings, ModelSettings, OptimSettings, QFormerSettings, VideoSettings
from qformer.config import AudioSpec, LanguageSpec, VisionSpec

MODELS = Path(__file__).parents[1] / "models"
AUDIO = AudioSettings(num_segments=NUM_SEGMENTS, segment_s=SEGMENT_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bridge:
    """One way to join frames and sound."""

    name: str
    """Of its step and run folder."""
    title: str
    temporal: Literal["mean", "cascaded", "spatio_temporal"]
    begins_as: str
    """Step whose checkpoint it starts from."""
    hears: bool = False
    knows_order: bool = True


BRIDGES = (
    Bridge(name="clip_mean", title="mean pooling", temporal="mean", begins_as="stage2", knows_order=False),
    Bridge(name="clip_cascaded", title="cascaded", temporal="cascaded", begins_as="stage2"),
    Bridge(name="clip_spatio_temporal", title="spatio-temporal", temporal="spatio_temporal", begins_as="stage2"),
    Bridge(
        name="clip_cascaded_sound",
        title="cascaded with sound",
        temporal="cascaded",
        begins_as="clip_cascaded",
        hears=True,
    ),
    Bridge(
        name="clip_spatio_temporal_sound",
        title="spatio-temporal with sound",
        temporal="spatio_temporal",
        begins_as="clip_spatio_temporal",
        hears=True,
    ),
)
"""Those that hear go on from those that see, as Video-LLaMA does; here both branches are then trained together."""


def train_settings(bridge: Bridge, output: Path, settings: DemoSettings) -> TrainSettings:
    """Settings of `qformer train` for one bridge.

    Args:
        bridge: Which.
        output: Folder of the demo, with its image part and the clips' features.
        settings: Of the demo.
    """
    demo, training, queries = settings.demo, settings.demo.clips.training, settings.demo.clips.queries
    seeing_steps = training.steps if bridge.knows_order else training.baseline_steps
    steps = training.sound_steps if bridge.hears else seeing_steps
    return TrainSettings(
        output=str(output / bridge.name),
        stage=2,
        init_from=str(output / bridge.begins_as),
        model=ModelSettings(
            vision=VisionSpec(str(MODELS / "vision")),
            audio=AudioSpec(str(MODELS / "audio")) if bridge.hears else None,
            audio_branch=AudioBranchSettings(num_queries=queries.audio, max_segments=NUM_SEGMENTS),
            language=LanguageSpec(str(MODELS / "clip_language")),
            temporal=bridge.temporal,
            video=VideoSettings(
                max_frames=NUM_FRAMES,
                num_queries=queries.cascaded,
                num_spatial_queries=queries.spatial,
                num_temporal_queries=queries.temporal,
            ),
            qformer=QFormerSettings(**demo.qformer.model_dump()),
        ),
        data=TrainDataSettings(
            manifest=str(output / "clip_data" / "manifest.parquet"),
            features=str(output / "clip_features"),
            num_frames=NUM_FRAMES,
            audio=AUDIO,
        ),
        optim=OptimSettings(
            learning_rate=training.learning_rate,
            min_learning_rate=training.learning_rate / 20,
            warmup_steps=min(30, steps // 10),
        ),
        steps=steps,
        batch_size=training.batch_size,
        workers=demo.workers,
        checkpoint_every=steps,
        keep_checkpoints=1,
        ray=settings.ray,
    )
