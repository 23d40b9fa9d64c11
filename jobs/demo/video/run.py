"""The video part of `qformer demo`: a corpus of clips, bridges that read order and sound, and their evaluation."""

from functools import partial
from pathlib import Path

from jobs.demo import results as image_results
from jobs.demo.settings import DemoSettings
from jobs.demo.steps import Steps
from jobs.demo.video import results
from jobs.demo.video.answers import decode_clips, write_answers
from jobs.demo.video.bridges import AUDIO, BRIDGES, MODELS, train_settings
from jobs.demo.video.world.corpus import MANIFEST_FILE, write_clip_world
from jobs.demo.video.world.render import NUM_FRAMES
from jobs.settings.corpus import FeaturesSettings, PrepareSettings
from jobs.settings.data import DataSettings, SourceSettings
from pipelines.evaluation.report.page import ResultRow
from qformer.backbones import load_vision
from qformer.config import AudioSpec, VisionSpec

TRAINING_STEPS = (*(bridge.name for bridge in BRIDGES), "clip_answers")
TITLE = "clips of held-out colour-shape combinations, forwards and backwards"


def run_jobs(steps: Steps, settings: DemoSettings) -> None:
    """Write, prepare and encode the clips, then train and evaluate every bridge.

    Needs an initialised Ray and stage 2 of the image demo.

    Args:
        steps: Steps of the demo; finished ones are reused.
        settings: Settings of the demo.
    """
    from jobs.data import features, prepare
    from jobs.train import job as train

    demo = settings.demo
    world, data = steps.folder("clip_world"), steps.folder("clip_data")
    values = demo.clips.world.model_dump()
    steps.run("clip_world", values, lambda: write_clip_world(world, **values))
    prepare_settings = PrepareSettings(
        sources=[SourceSettings(path=str(world / MANIFEST_FILE))],
        output=str(data),
        num_frames=NUM_FRAMES,
        ray=settings.ray,
    )
    steps.run("clip_data", {}, lambda: prepare.main(prepare_settings), after=("clip_world",))
    features_settings = FeaturesSettings(
        output=str(steps.folder("clip_features")),
        vision=VisionSpec(str(MODELS / "vision")),
        audio=AudioSpec(str(MODELS / "audio")),
        data=DataSettings(manifest=str(data / "manifest.parquet"), num_frames=NUM_FRAMES, audio=AUDIO),
        workers=demo.workers,
        ray=settings.ray,
    )
    values = features_settings.model_dump(mode="json")
    steps.run("clip_features", values, lambda: features.main(features_settings), after=("clip_data",))
    for bridge in BRIDGES:
        chosen = train_settings(bridge, steps.output, settings)
        after = ("clip_features", bridge.init_step)
        steps.run(bridge.name, chosen.model_dump(mode="json"), partial(train.main, chosen), after=after)
    names = tuple(bridge.name for bridge in BRIDGES)
    steps.run("clip_answers", {}, lambda: write_answers(steps.output), after=names)


def report(output: Path, seconds: dict[str, float]) -> list[ResultRow]:
    """Print the table, write the report and print its path.

    Args:
        output: Folder of the demo.
        seconds: Duration of each step.

    Returns:
        The table.
    """
    preprocessing = load_vision(VisionSpec(str(MODELS / "vision"))).preprocessing
    clips = decode_clips(output / "clip_data" / "manifest.parquet", preprocessing)
    own = {name: value for name, value in seconds.items() if name.startswith("clip_")}
    table = results.measure(output, clips, sum(own.values()))
    image_results.show(table, own, title=TITLE)
    print(f"\nreport: {results.write(output, clips, table)}")
    checkpoint, clip = output / BRIDGES[-1].name, next((output / "clip_world" / "clips").glob("clip-test-*"))
    print(f"next: qformer caption --set checkpoint={checkpoint} {clip}")
    return table
