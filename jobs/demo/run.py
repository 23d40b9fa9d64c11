"""`qformer demo`: all jobs on a synthetic corpus whose captions can be checked automatically."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Literal

from jobs.cluster.session import ray_session
from jobs.demo import results
from jobs.demo.endpoint import query_endpoint
from jobs.demo.pairs import write_retrieval_pairs
from jobs.demo.settings import DemoSettings
from jobs.demo.steps import Steps
from jobs.demo.video import run as video
from jobs.demo.world.corpus import write_world
from jobs.serve.job import require_free_port
from jobs.settings.corpus import FeaturesSettings, PrepareSettings
from jobs.settings.data import DataSettings, SourceSettings, TrainDataSettings
from jobs.settings.evaluate import EvaluateSettings
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.train import TrainSettings
from qformer.config import LanguageSpec, QFormerSizes, VisionSpec

MODELS = Path(__file__).parent / "models"
LOOPBACK = "127.0.0.1"
NUM_FRAMES = 4
NUM_RETRIEVAL_PAIRS = 200
TRAINING_STEPS = ("stage1", "stage2", "retrieval", "captions", "served")

logger = logging.getLogger(__name__)


def main(settings: DemoSettings) -> int:
    """Run the steps that are not done, print the table, write report.html.

    Returns:
        Exit code: 0 if every bar is met, 1 otherwise.

    Raises:
        UserError: If the output folder holds something else, or the port is taken.
    """
    demo = settings.demo
    steps = Steps(Path(demo.output).absolute())
    if demo.retrain:
        steps.delete(*TRAINING_STEPS, *video.TRAINING_STEPS)
    if not steps.is_done("served"):
        # Fail now, not after the training.
        require_free_port(LOOPBACK, demo.port)
    world = steps.folder("world")
    steps.run("world", demo.world.model_dump(), lambda: write_world(world, **demo.world.model_dump()))
    # One Ray session for all jobs saves a start for each.
    with ray_session(settings.ray):
        _run_jobs(steps, settings)
        if demo.video:
            video.run_jobs(steps, settings)
    table = results.measure(steps.output, min_whole_caption=demo.min_whole_caption)
    results.show(table, {name: value for name, value in steps.seconds.items() if not name.startswith("clip_")})
    results.write(steps.output, table)
    print(f"\nreport: {steps.output / 'report.html'}")
    print(f"next: qformer serve --set checkpoint={steps.folder('stage2')}   (then send your own image with curl)")
    if demo.video:
        table += video.report(steps.output, steps.seconds)
    return results.exit_code(table)


def _run_jobs(steps: Steps, settings: DemoSettings) -> None:
    """Prepare, train, evaluate and serve, each by its own job's `main`."""
    from jobs.data import features, prepare
    from jobs.evaluate import job as evaluate
    from jobs.train import job as train

    demo, world = settings.demo, steps.folder("world")
    data = steps.folder("data")
    prepare_settings = PrepareSettings(
        sources=[SourceSettings(path=str(world / "manifest.jsonl"))],
        output=str(data),
        num_frames=NUM_FRAMES,
        ray=settings.ray,
    )
    steps.run("data", {}, lambda: prepare.main(prepare_settings), after=("world",))
    manifest = data / "manifest.parquet"

    features_settings = FeaturesSettings(
        output=str(steps.folder("features")),
        vision=VisionSpec(str(MODELS / "vision")),
        data=DataSettings(manifest=str(manifest), num_frames=NUM_FRAMES),
        workers=demo.workers,
        ray=settings.ray,
    )
    values = features_settings.model_dump(mode="json")
    steps.run("features", values, lambda: features.main(features_settings), after=("data",))
    stage1 = _train_settings(steps, settings, stage=1)
    steps.run("stage1", stage1.model_dump(mode="json"), lambda: train.main(stage1), after=("features",))
    stage2 = _train_settings(steps, settings, stage=2)
    steps.run("stage2", stage2.model_dump(mode="json"), lambda: train.main(stage2), after=("stage1",))

    pairs = steps.folder("pairs") / "pairs.parquet"
    steps.run("pairs", {}, lambda: write_retrieval_pairs(manifest, world, pairs, NUM_RETRIEVAL_PAIRS), after=("data",))
    for name, checkpoint, table in (("retrieval", "stage1", pairs), ("captions", "stage2", manifest)):
        evaluate_settings = EvaluateSettings(
            checkpoint=str(steps.folder(checkpoint)),
            data=DataSettings(manifest=str(table), split="test"),
            output=str(steps.folder(name)),
            rerank_top_k=0,
            ray=settings.ray,
        )
        values = evaluate_settings.model_dump(mode="json")
        steps.run(name, values, partial(evaluate.main, evaluate_settings), after=("pairs", checkpoint))
    steps.run("served", {"port": demo.port}, lambda: query_endpoint(steps.output, demo.port), after=("captions",))


def _train_settings(steps: Steps, settings: DemoSettings, *, stage: Literal[1, 2]) -> TrainSettings:
    demo = settings.demo
    chosen = demo.stage1 if stage == 1 else demo.stage2
    return TrainSettings(
        output=str(steps.folder(f"stage{stage}")),
        stage=stage,
        init_from=str(steps.folder("stage1")) if stage == 2 else None,
        model=ModelSettings(
            vision=VisionSpec(str(MODELS / "vision")),
            language=LanguageSpec(str(MODELS / "language")),
            tokenizer="corpus",
            qformer=QFormerSizes(**dataclasses.asdict(demo.qformer)),
        ),
        data=TrainDataSettings(
            manifest=str(steps.folder("data") / "manifest.parquet"),
            features=str(steps.folder("features")),
            kind="image" if stage == 1 else None,
            num_frames=NUM_FRAMES,
        ),
        optim=OptimSettings(
            learning_rate=chosen.learning_rate,
            min_learning_rate=chosen.learning_rate / 20,
            # With 30 warm-up steps, stage 1 diverges at this rate, and may not recover.
            warmup_steps=min(90, chosen.steps // 5),
        ),
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        workers=demo.workers,
        checkpoint_every=250,
        ray=settings.ray,
    )
