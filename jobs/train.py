"""`qformer train`: one stage of training into one run folder."""

import functools
import itertools
import json
import logging
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli import run_job
from jobs.cluster_session import ray_session, require_resources
from jobs.run_folder import QUARANTINE_FILE, newest_checkpoint, run_folder
from jobs.settings import TrainSettings
from jobs.settings_loading import resolved_yaml
from jobs.train_checks import check, manifests
from pipelines.data import schema, storage
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
    from torch.optim import Optimizer

    from pipelines.data.batch import SampleBatch
    from pipelines.training.accounting import Accounting
    from pipelines.training.loop import Loop, LoopSettings
    from pipelines.training.run import TrainingRun

TOKENIZER_FOLDER, SUMMARY_FILE = "tokenizer", "summary.json"
LEARN_TOKENIZER = "corpus"

logger = logging.getLogger(__name__)


def main(settings: TrainSettings) -> dict[str, Any]:
    """Train, and return the run's summary (also written to summary.json).

    Raises:
        UserError: If settings, data or checkpoints do not fit; see each message.
    """
    settings = with_absolute_paths(settings)
    data = settings.data
    corpus = open_corpus(manifests(settings), split=data.split, kind=data.kind)
    order = Order(corpus.streams(data.mixture), settings.seed, settings.batch_size)
    check(settings, order.rows_per_epoch)
    cache = open_cache(data.features) if data.features else None
    if cache:
        cache.spec.require_decoding(decode_settings(settings, cache.spec.preprocessing))
        corpus = corpus.in_memory(functools.partial(locate, cache=cache))
    with run_folder(settings):
        if (settings.stage == 1 or settings.model.qformer_reads_prompt) and settings.model.tokenizer == LEARN_TOKENIZER:
            _learn_tokenizer(settings, corpus)
        summary = _launch(settings, corpus, order, cache)
        if "mistake" in summary:
            raise UserError(summary["mistake"])
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
        require_resources(
            settings.ray,
            {"workers": settings.workers, "decode_workers": settings.decode_workers},
            gpus={"workers": settings.workers} if settings.use_gpu else {},
        )
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
    """Train on one rank; the first rank's return value is the run's summary.

    A mistake of the user is returned as {"mistake": message}: raised, it would be tried again `max_failures` times.
    """
    from pipelines.training.accounting import TooManyQuarantinedError
    from pipelines.training.telemetry import RunLog
    from qformer.distributed import any_text, rank

    settings, mistake = TrainSettings.model_validate(arguments["settings"]), None
    try:
        run, optimizer, accounting, start_step = _built(arguments, settings)
    except UserError as error:
        mistake = str(error)
    # Other ranks may have come through, and would wait for this one.
    if (mistake := any_text(mistake)) is not None:
        return {"mistake": mistake}
    log = RunLog(settings.output, arguments["board"], start_step) if rank() == 0 else None
    try:
        loop = _loop(arguments, settings, run, optimizer, accounting, log.write if log else _ignore)
        loop.run(_batches(arguments, settings, run, start_step), start_step)
        run.assert_frozen()
    except TooManyQuarantinedError as error:  # raised by all ranks at the same step
        mistake = str(error)
    finally:
        if log:
            log.close()
            write_table(accounting.table(), storage.join(settings.output, QUARANTINE_FILE))
    if mistake is not None:
        return {"mistake": mistake}
    stages = loop.times.combined(run.encode.seconds)
    return _summary(run, accounting, settings, start_step, log.records if log else [], stages)


def _built(arguments: dict[str, Any], settings: TrainSettings) -> "tuple[TrainingRun, Optimizer, Accounting, int]":
    """The run as it starts or goes on: model, optimizer, rows so far, steps done."""
    from ray.train.torch import get_device

    from pipelines.training.accounting import Accounting
    from pipelines.training.optim import build_optimizer
    from pipelines.training.run import TrainingRun, choice_from
    from qformer.distributed import rank

    choice = choice_from(
        settings.model.model_dump(),
        stage=settings.stage,
        num_frames=settings.data.num_frames,
        sampling=settings.data.sampling.model_dump(mode="json"),
        tokenizer=_tokenizer_folder(settings),
    )
    cache: FeatureCache | None = arguments["cache"]
    run = TrainingRun(
        choice,
        get_device(),
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
    newest = newest_checkpoint(settings.output)
    if newest is None:
        return run, optimizer, Accounting(), 0
    state = run.restore(newest, optimizer, order=arguments["order"])
    return run, optimizer, Accounting.from_state(state.accounting), state.step


def _batches(
    arguments: dict[str, Any], settings: TrainSettings, run: "TrainingRun", start_step: int
) -> "Iterator[SampleBatch]":
    from pipelines.training.feed import rank_batches
    from qformer.distributed import any_text, rank, world_size

    return rank_batches(
        arguments["feed"],
        attempt=str(any_text(uuid.uuid4().hex)),  # the first rank's, on every rank
        start_step=start_step,
        total_steps=settings.steps,
        rank=rank(),
        world_size=world_size(),
        source=arguments["cache"] or decode_settings(settings, run.preprocessing),
    )


def _loop(
    arguments: dict[str, Any],
    settings: TrainSettings,
    run: "TrainingRun",
    optimizer: "Optimizer",
    accounting: "Accounting",
    log: Callable[[dict[str, float]], None],
) -> "Loop":
    import torch
    from ray.train.torch import get_device

    from pipelines.training.loop import Loop
    from qformer.distributed import rank, world_size

    trainables: torch.nn.Module = run.stage.trainables
    if world_size() > 1:
        device = get_device()
        devices = [device.index] if device.type == "cuda" else None
        trainables = torch.nn.parallel.DistributedDataParallel(trainables, device_ids=devices)

    def save(done: int) -> None:
        if rank() == 0:
            order = arguments["order"]
            run.save(settings.output, done, optimizer, accounting, order=order, settings=resolved_yaml(settings))

    return Loop(run.stage, trainables, optimizer, accounting, _loop_settings(arguments), log, save)


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
        sampling=data.sampling.build(),
        limits=Limits(**data.limits.model_dump()),
        augmentation=Augmentation(**data.augmentation.model_dump()),
    )


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
