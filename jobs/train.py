"""`qformer train`: one stage of training into one run folder."""

import functools
import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.cli import run_job
from jobs.cluster_session import ray_session
from jobs.settings import TrainSettings
from jobs.settings_loading import resolved_yaml
from pipelines.data import quarantine, schema, storage
from pipelines.data.batch import Failure
from pipelines.data.features import FeatureCache, locate, open_cache
from pipelines.data.manifest import write_table
from pipelines.data.mixture import Corpus, open_corpus
from pipelines.data.order import Order
from pipelines.data.row_index import streamed
from pipelines.data.samples import DecodeSettings, Limits
from pipelines.data.stage_report import run_table
from pipelines.data.transforms import Augmentation
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pipelines.training.accounting import Accounting
    from pipelines.training.loop import LoopSettings
    from pipelines.training.run import TrainingRun

TOKENIZER_FOLDER, SUMMARY_FILE, QUARANTINE_FILE = "tokenizer", "summary.json", "quarantine.parquet"
LEARN_TOKENIZER = "corpus"

logger = logging.getLogger(__name__)


def main(settings: TrainSettings) -> dict[str, Any]:
    """Train, and return the run's summary (also written to summary.json).

    Raises:
        UserError: If settings, data or checkpoints do not fit; see each message.
    """
    settings = with_absolute_paths(settings)
    data = settings.data
    corpus = open_corpus(_manifests(settings), split=data.split, kind=data.kind)
    order = Order(corpus.streams(data.mixture), settings.seed, settings.batch_size)
    _check(settings, order.rows_per_epoch)
    cache = open_cache(data.features) if data.features else None
    if cache:
        cache.spec.require_decoding(decode_settings(settings, cache.spec.preprocessing))
        corpus = corpus.in_memory(functools.partial(locate, cache=cache))
    storage.write_text(storage.join(settings.output, "settings.yaml"), resolved_yaml(settings))
    if (settings.stage == 1 or settings.model.qformer_reads_prompt) and settings.model.tokenizer == LEARN_TOKENIZER:
        _learn_tokenizer(settings, corpus)
    summary = _launch(settings, corpus, order, cache)
    failures = [(value.pop("epoch"), Failure(**value)) for value in summary.pop("failures")]
    tables = [quarantine.to_table([failure], epoch) for epoch, failure in failures] or [quarantine.to_table([])]
    write_table(pa.concat_tables(tables), storage.join(settings.output, QUARANTINE_FILE))
    storage.write_text(storage.join(settings.output, SUMMARY_FILE), json.dumps(summary, indent=2) + "\n")
    parameters, names = summary["trainable_parameters"], summary["trainable_names"]
    logger.info(
        "trained %d parameters in %d tensors, listed in %s; %d texts were cut",
        parameters,
        len(names),
        SUMMARY_FILE,
        summary["texts_truncated"],
    )
    logger.info("run folder %s; curves: tensorboard --logdir %s", settings.output, settings.output)
    print(run_table(summary["stages"], workers=settings.workers, decode_workers=settings.decode_workers))
    print(summary["accounting"])
    return summary


def _launch(settings: TrainSettings, corpus: Corpus, order: Order, cache: FeatureCache | None) -> dict[str, Any]:
    """Run `train_worker` on every rank and return the first rank's result."""
    with ray_session(settings.ray, include_dashboard=True), tempfile.TemporaryDirectory() as scratch:
        import ray

        from pipelines.training.feed import BatchFeed
        from pipelines.training.launch import launch

        actor = ray.remote(BatchFeed).options(num_cpus=0)
        rows = ray.put(corpus)
        feed = actor.remote(order, [rows], total_steps=settings.steps, decode_workers=settings.decode_workers)
        try:
            return launch(
                train_worker,
                {
                    "settings": settings.model_dump(),
                    "feed": feed,
                    "cache": cache,
                    "order": f"{order.fingerprint}/{corpus.fingerprint}/{settings.stage}",
                    "rows": order.rows_per_epoch,
                    "steps_per_epoch": order.steps_per_epoch,
                },
                workers=settings.workers,
                use_gpu=settings.use_gpu,
                max_failures=settings.max_failures,
                name=f"stage {settings.stage}",
                scratch=scratch,
                total_steps=settings.steps,
            )
        finally:
            ray.kill(feed)


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train on one rank; the first rank's return value is the run's summary."""
    import torch
    from ray.train.torch import get_device

    from pipelines.training.accounting import Accounting
    from pipelines.training.feed import rank_batches
    from pipelines.training.loop import Loop
    from pipelines.training.optim import build_optimizer
    from pipelines.training.run import TrainingRun, choice_from
    from pipelines.training.telemetry import RunLog
    from qformer.distributed import rank, world_size

    settings, order = TrainSettings.model_validate(arguments["settings"]), arguments["order"]
    device = get_device()
    choice = choice_from(
        settings.model.model_dump(),
        stage=settings.stage,
        num_frames=settings.data.num_frames,
        tokenizer=_tokenizer_folder(settings),
    )
    cache: FeatureCache | None = arguments["cache"]
    run = TrainingRun(
        choice,
        device,
        precision=settings.precision,
        seed=settings.seed,
        init_from=settings.init_from,
        features=cache.spec if cache else None,
        is_compiled=settings.compile,
    )
    optim = settings.optim
    optimizer = build_optimizer(run.stage.trainables, weight_decay=optim.weight_decay, betas=optim.betas)
    if rank() == 0:
        arguments["board"].say.remote(f"weights {run.load_report}")
    accounting, start_step = Accounting(), 0
    newest = _newest_checkpoint(settings.output)
    if newest is not None:
        state = run.restore(newest, optimizer, order=order)
        accounting, start_step = Accounting.from_state(state.accounting), state.step
    trainables: torch.nn.Module = run.stage.trainables
    if world_size() > 1:
        devices = [device.index] if device.type == "cuda" else None
        trainables = torch.nn.parallel.DistributedDataParallel(trainables, device_ids=devices)
    log = RunLog(settings.output, arguments["board"], start_step) if rank() == 0 else None

    def save(done: int) -> None:
        if rank() == 0:
            run.save(settings.output, done, optimizer, accounting, order=order, settings=resolved_yaml(settings))

    batches = rank_batches(
        arguments["feed"],
        start_step=start_step,
        total_steps=settings.steps,
        rank=rank(),
        world_size=world_size(),
        source=cache or decode_settings(settings, run.preprocessing),
    )
    loop = Loop(
        run.stage, trainables, optimizer, accounting, _loop_settings(arguments), log.write if log else _ignore, save
    )
    loop.run(batches, start_step)
    run.assert_frozen()
    if log:
        log.close()
    stages = loop.times.combined(run.encode.seconds)
    return _summary(run, accounting, settings, start_step, log.records if log else [], stages)


def _loop_settings(arguments: dict[str, Any]) -> "LoopSettings":
    """Translate the worker's arguments for the loop."""
    from pipelines.training.loop import LoopSettings

    settings = TrainSettings.model_validate(arguments["settings"])
    return LoopSettings(
        steps=settings.steps,
        steps_per_epoch=arguments["steps_per_epoch"],
        rows_per_epoch=arguments["rows"],
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        seed=settings.seed,
        max_quarantine_share=settings.max_quarantine_share,
        precision=settings.precision,
        **settings.optim.model_dump(exclude={"weight_decay", "betas"}),
    )


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Workers run in other folders: make every local path absolute. Hub names and URIs stay as they are."""

    def absolute(path: str | None) -> str | None:
        return storage.local_path(path) if path and storage.is_local(path) and storage.exists(path) else path

    model = settings.model
    folders = {name: absolute(getattr(model, name)) for name in ("vision", "language", "tokenizer", "qformer_init")}
    if model.tokenizer == LEARN_TOKENIZER:
        folders["tokenizer"] = LEARN_TOKENIZER
    output = storage.local_path(settings.output) if storage.is_local(settings.output) else settings.output
    return settings.model_copy(
        update={
            "output": output,
            "data": settings.data.model_copy(update={"features": absolute(settings.data.features)}),
            "init_from": absolute(settings.init_from),
            "model": model.model_copy(update=folders),
        }
    )


def decode_settings(settings: TrainSettings, preprocessing: Preprocessing) -> DecodeSettings:
    """How this run's files become pixels."""
    data = settings.data
    return DecodeSettings(
        preprocessing=preprocessing,
        num_frames=data.num_frames,
        limits=Limits(**data.limits.model_dump()),
        augmentation=Augmentation(**data.augmentation.model_dump()),
    )


def _manifests(settings: TrainSettings) -> list[tuple[str, float | None]]:
    """Path and weight of each manifest."""
    manifest = settings.data.manifest
    if isinstance(manifest, str):
        return [(manifest, None)]
    return [(one.path, one.weight) for one in manifest]


def _check(settings: TrainSettings, num_rows: int) -> None:
    """Refuse what cannot work before any worker starts."""
    if settings.batch_size > num_rows:
        raise UserError(
            f"batch_size={settings.batch_size} is larger than the {num_rows} rows of split {settings.data.split!r} in "
            f"{', '.join(path for path, _ in _manifests(settings))}; lower it"
        )
    if settings.batch_size < settings.workers:
        raise UserError(
            f"batch_size={settings.batch_size} gives some of the {settings.workers} workers nothing; raise it"
        )
    augmentation = settings.data.augmentation
    if settings.data.features and (augmentation.random_resized_crop or augmentation.horizontal_flip):
        raise UserError(
            "data.features holds the encoder's view of the plain picture, so data.augmentation cannot change it; "
            "leave one of them out"
        )
    if settings.stage == 2 and settings.model.language is None:
        raise UserError("model.language is not set; stage 2 needs a language model (hub name or folder)")
    if settings.stage == 1 and settings.init_from is not None:
        raise UserError(f"init_from={settings.init_from!r} belongs to stage 2; to go on with stage 1 use --resume")
    if settings.init_from is not None:
        storage.newest_checkpoint(settings.init_from)
    if settings.resume:
        if not storage.exists(settings.output):
            raise UserError(f"resume: {settings.output} does not exist; start the run without --resume")
        logger.info("resuming from %s", _newest_checkpoint(settings.output) or "the start: no checkpoint yet")
    else:
        storage.require_unused(settings.output, "output")


def _learn_tokenizer(settings: TrainSettings, corpus: Corpus) -> None:
    """Learn the vocabulary once per run; a resumed run keeps its own."""
    from pipelines.training.vocabulary import learn_text_tokenizer

    folder = _tokenizer_folder(settings)
    if storage.exists(folder):
        return
    if not storage.is_local(folder):
        raise UserError(
            f"model.tokenizer='corpus' needs a local output, not {settings.output!r}; learn it in a local run and "
            "give that run's tokenizer folder"
        )
    tables = itertools.chain.from_iterable(streamed(source.rows) for source in corpus.sources)
    captions = (text for table in tables for texts in table[schema.CAPTIONS].to_pylist() for text in texts)
    learn_text_tokenizer(captions, Path(storage.local_path(folder)))


def _tokenizer_folder(settings: TrainSettings) -> str:
    if settings.model.tokenizer != LEARN_TOKENIZER:
        return settings.model.tokenizer
    return storage.join(settings.output, TOKENIZER_FOLDER)


def _newest_checkpoint(output: str) -> str | None:
    """Newest checkpoint of this run, also one written before a restart of the workers; None before the first."""
    try:
        return storage.newest_checkpoint(output)
    except UserError:
        return None


def _summary(
    run: "TrainingRun",
    accounting: "Accounting",
    settings: TrainSettings,
    start_step: int,
    records: list[dict[str, float]],
    stages: dict[str, float],
) -> dict[str, Any]:
    return {
        "stage": settings.stage,
        "steps": settings.steps,
        "resumed_from_step": start_step,
        "accounting": accounting.line,
        "rows_in": accounting.rows_in,
        "rows_used": accounting.rows_used,
        "rows_quarantined": accounting.rows_quarantined,
        "texts_truncated": run.num_truncated(),
        "failures": list(accounting.quarantined.values()),
        "load_report": run.load_report,
        "trainable_parameters": sum(p.numel() for p in run.stage.trainables.parameters() if p.requires_grad),
        "trainable_names": run.trainable_names,
        "frozen_sha256": run.fingerprints,
        "last": records[-1] if records else {},
        "stages": stages,
    }


def _ignore(values: dict[str, float]) -> None:
    """Only the first rank keeps a log."""


if __name__ == "__main__":
    sys.exit(run_job("train"))
