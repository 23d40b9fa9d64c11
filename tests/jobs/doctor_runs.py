"""Real runs for the doctor: trained for seconds in this process, without Ray, into folders like those of the job."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from jobs.demo.world.corpus import write_world
from jobs.settings.data import TrainDataSettings
from jobs.settings.loading import resolved_yaml
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.train import TrainSettings
from jobs.train.inputs import model_choice, tokenizer_folder
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.features.shard_encoder import EncoderChoice
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.storage.checkpoint_folders import COMPLETE_MARKER, write_marker
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import QueryCollapseMonitor
from pipelines.training.run.checkpoint import write_checkpoint
from pipelines.training.run.model import Training, TrainingRun
from pipelines.training.run.vocabulary import learn_text_tokenizer
from pipelines.training.step.guard import StepGuard
from pipelines.training.step.loop import Hooks, Loop, LoopSettings
from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import build_optimizer
from pipelines.training.step.precision import Precision
from qformer.config import QFormerSizes, VisionSpec
from qformer.conversion.checkpoint import WEIGHTS_FILE

MODELS = Path(__file__).parents[2] / "jobs" / "demo" / "models"
CPU = torch.device("cpu")
SMALL = QFormerSizes(
    hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96, num_queries=4, embed_dim=32, dropout=0.0
)


@dataclass(frozen=True)
class World:
    """Captioned pictures, and what the frozen encoder sees of those to train on."""

    folder: Path
    rows: list[dict]
    tokens: np.ndarray
    spec: object

    @property
    def manifest(self):
        return self.folder / "manifest.jsonl"


def small_world(folder, *, num_images, num_test_images):
    write_world(
        folder, num_images=num_images, num_clips=0, num_test_images=num_test_images, num_test_clips=0, seed=3,
        broken_share=0,
    )  # fmt: skip
    encoder, spec = EncoderChoice(
        vision=VisionSpec(str(MODELS / "vision")), precision="fp32", num_frames=2, dtype="fp16"
    ).load()
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    decoder = SampleDecoder(DecodeSettings(preprocessing=encoder.preprocessing))
    pixels = [decoder.decode(kind="image", media=str(folder / row["media"])).pixels for row in rows]
    decoder.close()
    tokens = torch.cat([encoder(torch.from_numpy(np.stack(pixels[at : at + 64]))) for at in range(0, len(pixels), 64)])
    return World(folder, rows, tokens.numpy(), spec)


def settings_of(world, output, **changes):
    values = {
        "output": str(output),
        "stage": 1,
        "model": ModelSettings(
            vision=str(MODELS / "vision"), language=str(MODELS / "language"), tokenizer="corpus", qformer=SMALL,
            max_text_tokens=24,
        ),
        "data": TrainDataSettings(manifest=str(world.manifest), num_frames=2),
        "optim": OptimSettings(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=10),
        "steps": 100,
        "batch_size": 32,
        "checkpoint_every": 50,
        "log_every": 5,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


def batches(world, settings, captions):
    """Rows in random order; each with one of its captions."""
    rng = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        chosen = rng.choice(len(world.rows), settings.batch_size, replace=False)
        texts = [captions[row][rng.integers(len(captions[row]))] for row in chosen]
        names = [world.rows[row]["sample_id"] for row in chosen]
        valid = np.ones(len(chosen), dtype=np.bool_)
        yield SampleBatch(
            step=step, rank=0, sample_ids=names, captions=texts, instructions=[""] * len(chosen), image_ids=chosen,
            is_valid=valid, images=world.tokens[chosen], failures=[], frame_valid=valid[:, None],
        )  # fmt: skip


def train_run(world, settings, captions=None):
    """Train into `settings.output`; `captions` of each row take the place of the world's own."""
    output = Path(settings.output)
    output.mkdir(parents=True)
    (output / "settings.yaml").write_text(resolved_yaml(settings))
    captions = captions or [row["captions"] for row in world.rows]
    tokenizer = Path(tokenizer_folder(settings))
    learn_text_tokenizer(lambda: itertools.chain.from_iterable(captions), tokenizer)
    run = TrainingRun(
        model_choice(settings.model, stage=settings.stage, num_frames=2, tokenizer=str(tokenizer)),
        CPU, precision=settings.precision, seed=settings.seed, init_from=settings.init_from, features=world.spec,
    )  # fmt: skip
    optim, terms = settings.optim, run.stage.terms
    training = Training(
        optimizer=build_optimizer(run.stage.trainables, weight_decay=optim.weight_decay, betas=optim.betas),
        objective=Objective(terms, optim.loss_weights.model_dump(exclude={"is_learned"})),
        precision=Precision(settings.precision, CPU),
        ema=None,
        order="order",
    )
    accounting = Accounting()
    trainable = {"names": run.trainable_names, "parameters": run.num_trainable}
    start = {"step": 0, "workers": 1, "commit": "abc", "trainable": trainable, "frozen_sha256": run.fingerprints}
    _append(output / "starts.jsonl", start)
    _append(output / "events.jsonl", {"text": "starting at step 0"})

    def save(done):
        write_checkpoint(str(output), run.checkpoint(done, training, accounting, settings=resolved_yaml(settings)))

    loop = Loop(
        stage=run.stage,
        call=run.stage.trainables,
        optimizer=training.optimizer,
        objective=training.objective,
        precision=training.precision,
        accounting=accounting,
        settings=LoopSettings(
            steps=settings.steps, steps_per_epoch=10**6, rows_per_epoch=10**6, learning_rate=optim.learning_rate,
            min_learning_rate=optim.min_learning_rate, warmup_steps=optim.warmup_steps, clip_norm=optim.clip_norm,
            checkpoint_every=settings.checkpoint_every, log_every=settings.log_every, seed=settings.seed,
            max_quarantine_share=0.05,
        ),
        guard=StepGuard(3, print, print),
        queries=QueryCollapseMonitor(print),
        flops=StepFlops(CPU),
        hooks=Hooks(log=lambda values: _append(output / "metrics.jsonl", values), save=save),
    )  # fmt: skip
    loop.run(batches(world, settings, captions), 0)
    return output


def change_weights(checkpoint, change):
    """Put other weights into a checkpoint, and finish it anew as if they had been written so."""
    weights = load_file(checkpoint / WEIGHTS_FILE)
    change(weights)
    save_file(weights, checkpoint / WEIGHTS_FILE)
    finish(checkpoint)


def finish(checkpoint):
    """Mark a checkpoint as whole as it is now."""
    (checkpoint / COMPLETE_MARKER).unlink()
    write_marker(checkpoint, {})


def _append(file, values):
    with file.open("a") as opened:
        opened.write(json.dumps(values) + "\n")
