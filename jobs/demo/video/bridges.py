"""The bridges that the video demo compares, and how each is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.demo.settings import ClipQuerySettings, DemoSettings
from jobs.demo.video.backbones.audio import NUM_SEGMENTS, SEGMENT_S
from jobs.demo.video.world.film import NUM_FRAMES
from jobs.settings.data import AudioSettings, TrainDataSettings
from jobs.settings.jobs import TrainSettings
from jobs.settings.model import AudioBranchSettings, ModelSettings, OptimSettings, QFormerSettings
from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.mean import MeanConfig
from qformer.bridges.spatio_temporal import SpatioTemporalConfig
from qformer.bridges.table import BridgeConfig

MODELS = Path(__file__).parents[1] / "models"
AUDIO = AudioSettings(num_segments=NUM_SEGMENTS, segment_s=SEGMENT_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bridge:
    """One way to join frames and sound."""

    name: str
    """Of its step and run folder."""
    title: str
    kind: Literal["mean", "cascaded", "spatio_temporal"]
    begins_as: str
    """Step whose checkpoint it starts from."""
    hears: bool = False
    knows_order: bool = True


BRIDGES = (
    Bridge(name="clip_mean", title="mean pooling", kind="mean", begins_as="stage2", knows_order=False),
    Bridge(name="clip_cascaded", title="cascaded", kind="cascaded", begins_as="stage2"),
    Bridge(name="clip_spatio_temporal", title="spatio-temporal", kind="spatio_temporal", begins_as="stage2"),
    Bridge(
        name="clip_cascaded_sound",
        title="cascaded with sound",
        kind="cascaded",
        begins_as="clip_cascaded",
        hears=True,
    ),
    Bridge(
        name="clip_spatio_temporal_sound",
        title="spatio-temporal with sound",
        kind="spatio_temporal",
        begins_as="clip_spatio_temporal",
        hears=True,
    ),
)
"""Those that hear go on from those that see, as Video-LLaMA does; here both branches are then trained together."""


def _config(bridge: Bridge, queries: ClipQuerySettings) -> BridgeConfig:
    """Kind and sizes of a bridge."""
    match bridge.kind:
        case "mean":
            return MeanConfig()
        case "cascaded":
            return CascadedConfig(max_frames=NUM_FRAMES, num_queries=queries.cascaded)
        case "spatio_temporal":
            return SpatioTemporalConfig(
                max_frames=NUM_FRAMES, num_spatial_queries=queries.spatial, num_temporal_queries=queries.temporal
            )


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
            vision=str(MODELS / "vision"),
            audio=str(MODELS / "audio") if bridge.hears else None,
            audio_branch=AudioBranchSettings(num_queries=queries.audio, max_segments=NUM_SEGMENTS),
            language=str(MODELS / "clip_language"),
            bridge=_config(bridge, queries),
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
