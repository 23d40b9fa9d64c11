"""The bridges that the video demo compares, and their training settings."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.demo.settings import ClipQuerySettings, DemoSettings
from jobs.demo.video.backbones.audio import NUM_SEGMENTS, SEGMENT_S
from jobs.demo.video.world.render import NUM_FRAMES
from jobs.settings.data import AudioSettings, TrainDataSettings
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.train import TrainSettings
from pipelines.training.run.model_choice import AudioBranchOptions
from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.mean import MeanConfig
from qformer.bridges.spatio_temporal import SpatioTemporalConfig
from qformer.bridges.table import BridgeConfig
from qformer.config import AudioSpec, LanguageSpec, QFormerSizes, VisionSpec

MODELS = Path(__file__).parents[1] / "models"
AUDIO = AudioSettings(num_segments=NUM_SEGMENTS, segment_s=SEGMENT_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoBridge:
    """One bridge of the comparison."""

    name: str
    """Name of its step and run folder."""
    title: str
    kind: Literal["mean", "cascaded", "spatio_temporal"]
    init_step: str
    """Step whose checkpoint it starts from."""
    reads_sound: bool = False
    reads_order: bool = True


BRIDGES = (
    DemoBridge(name="clip_mean", title="mean pooling", kind="mean", init_step="stage2", reads_order=False),
    DemoBridge(name="clip_cascaded", title="cascaded", kind="cascaded", init_step="stage2"),
    DemoBridge(name="clip_spatio_temporal", title="spatio-temporal", kind="spatio_temporal", init_step="stage2"),
    DemoBridge(
        name="clip_cascaded_sound",
        title="cascaded with sound",
        kind="cascaded",
        init_step="clip_cascaded",
        reads_sound=True,
    ),
    DemoBridge(
        name="clip_spatio_temporal_sound",
        title="spatio-temporal with sound",
        kind="spatio_temporal",
        init_step="clip_spatio_temporal",
        reads_sound=True,
    ),
)
"""Bridges with sound start from those without, as in Video-LLaMA; here both branches then train together."""


def _config(bridge: DemoBridge, queries: ClipQuerySettings) -> BridgeConfig:
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


def train_settings(bridge: DemoBridge, output: Path, settings: DemoSettings) -> TrainSettings:
    """Settings of `qformer train` for one bridge.

    Args:
        bridge: Bridge to train.
        output: Folder of the demo, with its image part and the features of the clips.
        settings: Settings of the demo.
    """
    demo, training, queries = settings.demo, settings.demo.clips.training, settings.demo.clips.queries
    visual_steps = training.steps if bridge.reads_order else training.baseline_steps
    steps = training.sound_steps if bridge.reads_sound else visual_steps
    return TrainSettings(
        output=str(output / bridge.name),
        stage=2,
        init_from=str(output / bridge.init_step),
        model=ModelSettings(
            vision=VisionSpec(str(MODELS / "vision")),
            audio=AudioSpec(str(MODELS / "audio")) if bridge.reads_sound else None,
            audio_branch=AudioBranchOptions(num_queries=queries.audio, max_segments=NUM_SEGMENTS),
            language=LanguageSpec(str(MODELS / "clip_language")),
            bridge=_config(bridge, queries),
            qformer=QFormerSizes(**dataclasses.asdict(demo.qformer)),
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
