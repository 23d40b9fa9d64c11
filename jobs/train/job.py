"""`qformer train`: one stage of training into one run folder."""

import functools
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.cluster.session import ray_session, require_resources
from jobs.folders.output import SUMMARY_FILE
from jobs.folders.run import run_folder
from jobs.settings.train import TrainSettings
from jobs.train.inputs import LEARN_TOKENIZER, tokenizer_folder, with_absolute_paths
from jobs.train.rows import TrainingRows, start_coordinator, start_feed, training_rows, validation_rows
from pipelines.data import schema, storage
from pipelines.data.batches.stage_report import run_table
from pipelines.data.order.mixture import Corpus
from pipelines.data.order.row_index import stream_rows
from qformer.errors import UserError

_ELASTIC_FAILURES = 100
"""Who asks for fewer workers expects that nodes are lost, time and again in a run of weeks."""

logger = logging.getLogger(__name__)


def main(settings: TrainSettings) -> dict[str, Any]:
    """Train, and return the run's summary (also written to summary.json).

    Raises:
        UserError: If settings, data or checkpoints do not fit; see each message.
    """
    settings = with_absolute_paths(settings)
    rows = training_rows(settings)
    validation = validation_rows(settings)
    with run_folder(settings):
        reads_text = settings.init_from is None if settings.stage == 1 else settings.model.qformer_reads_prompt
        if reads_text and settings.model.tokenizer == LEARN_TOKENIZER:
            _learn_tokenizer(settings, rows.corpus)
        summary = _launch(settings, rows, validation)
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


def _launch(settings: TrainSettings, rows: TrainingRows, validation: TrainingRows | None) -> dict[str, Any]:
    """Run `train_worker` on every rank and return the first rank's result."""
    with ray_session(settings.ray), tempfile.TemporaryDirectory() as scratch:
        workers = settings.min_workers or settings.workers
        require_resources(
            settings.ray,
            {"workers": workers, "decode_workers": settings.decode_workers},
            gpus={"workers": workers} if settings.use_gpu else {},
        )
        import ray

        from jobs.train.reporter import append_events
        from jobs.train.worker import train_worker
        from jobs.train.worker_job import WorkerJob, feed_handle
        from pipelines.training.group.launch import launch

        # An elastic group on CPUs takes all there are, and the validation decodes while the training's decoders wait:
        # neither must wait for a CPU of their own.
        decoders = {"decode_workers": settings.decode_workers}
        is_greedy = settings.min_workers is not None and not settings.use_gpu
        coordinator = start_coordinator(rows, total_steps=settings.steps, reserves_cpus=not is_greedy, **decoders)
        feeds = [coordinator]
        validation_feed = None
        if validation is not None:
            steps = validation.order.steps_per_epoch
            feeds.append(start_feed(validation, total_steps=steps, reserves_cpus=False, **decoders))
            validation_feed = feed_handle(feeds[-1], validation)
        job = WorkerJob(
            settings=settings,
            coordinator=coordinator,
            training=feed_handle(coordinator, rows),
            validation=validation_feed,
            order=f"{rows.order.fingerprint}/{rows.corpus.fingerprint}/{settings.stage}",
        )
        try:
            return launch(
                train_worker,
                {"job": job},
                coordinator=coordinator,
                workers=settings.workers,
                min_workers=settings.min_workers,
                use_gpu=settings.use_gpu,
                max_failures=_max_failures(settings),
                hang_timeout_s=settings.hang_timeout_s,
                name=f"stage {settings.stage}",
                scratch=scratch,
                total_steps=settings.steps,
                save_failures=functools.partial(append_events, settings.output),
            )
        finally:
            for feed in feeds:
                ray.kill(feed)


def _max_failures(settings: TrainSettings) -> int:
    if settings.max_failures is not None:
        return settings.max_failures
    return 0 if settings.min_workers is None else _ELASTIC_FAILURES


def _learn_tokenizer(settings: TrainSettings, corpus: Corpus) -> None:
    """Learn the vocabulary once per run; a resumed run has one."""
    from pipelines.training.run.vocabulary import learn_text_tokenizer

    folder = tokenizer_folder(settings)
    if storage.exists(folder):
        return
    if not storage.is_local(folder):
        raise UserError(
            f"model.tokenizer='corpus' needs a local output, not {settings.output!r}; learn it in a local run and "
            "give that run's tokenizer folder"
        )

    def captions() -> Iterator[str]:
        tables = itertools.chain.from_iterable(stream_rows(source.rows) for source in corpus.sources)
        return (text for table in tables for texts in table[schema.CAPTIONS].to_pylist() for text in texts)

    learn_text_tokenizer(captions, Path(storage.local_path(folder)))
