"""Rows of a training run, their order, and the actors that hand them out."""

import functools
from dataclasses import dataclass
from typing import Any

from jobs.settings.train import TrainSettings
from jobs.train.checks import check, manifests, require_media_answer
from jobs.train.inputs import decode_settings
from pipelines.data.features.cache import FeatureCache, locate, open_cache
from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import Corpus, open_corpus
from qformer.errors import UserError


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows of a batch feed."""

    corpus: Corpus
    order: Order
    cache: FeatureCache | None
    """Feature cache that is read instead of pixels; None to decode files."""


def training_rows(settings: TrainSettings) -> TrainingRows:
    """Rows to train on.

    Raises:
        UserError: If settings and data do not fit.
    """
    data = settings.data
    corpus = open_corpus(manifests(settings), split=data.split, kind=data.kind)
    order = Order(corpus.streams(data.mixture), settings.seed, settings.batch_size)
    check(settings, order.rows_per_epoch)
    if data.features is None:
        require_media_answer(corpus)
    return _with_cache(settings, corpus, order, data.features)


def validation_rows(settings: TrainSettings) -> TrainingRows | None:
    """Rows to validate on, each of them once an epoch; None without validation.

    Raises:
        UserError: If settings and data do not fit.
    """
    validation, data = settings.validation, settings.data
    if validation is None:
        return None
    if (validation.features is None) != (data.features is None):
        raise UserError(
            f"data.features={data.features!r} but validation.features={validation.features!r}: the encoder runs for "
            "both or for neither; run `qformer features` over the validation split too"
        )
    paths = manifests(settings) if validation.manifest is None else [(validation.manifest, None)]
    corpus = open_corpus([(path, None) for path, _ in paths], split=validation.split, kind=data.kind)
    order = Order(corpus.streams("proportional"), settings.seed, settings.batch_size)
    return _with_cache(settings, corpus, order, validation.features)


def start_coordinator(rows: TrainingRows, *, total_steps: int, decode_workers: int, reserves_cpus: bool) -> Any:
    """Start the `RunCoordinator` actor of a run, with a batch feed over the rows to train on."""
    from pipelines.training.group.coordinator import RunCoordinator
    from pipelines.training.group.feed import BatchFeed

    feed = BatchFeed(
        rows.order,
        _corpus_reference(rows),
        total_steps=total_steps,
        decode_workers=decode_workers,
        reserves_cpus=reserves_cpus,
    )
    return _actor_class(RunCoordinator).remote(feed)


def start_feed(rows: TrainingRows, *, total_steps: int, decode_workers: int, reserves_cpus: bool) -> Any:
    """Start a `BatchFeed` actor over other rows than those to train on."""
    from pipelines.training.group.feed import BatchFeed

    return _actor_class(BatchFeed).remote(
        rows.order,
        _corpus_reference(rows),
        total_steps=total_steps,
        decode_workers=decode_workers,
        reserves_cpus=reserves_cpus,
    )


def _actor_class(kind: type) -> Any:
    import ray

    from pipelines.training.group.launch import driver_node_affinity

    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=driver_node_affinity())


def _corpus_reference(rows: TrainingRows) -> list[Any]:
    """The corpus in Ray's object store, in a list, since Ray resolves a bare reference."""
    import ray

    return [ray.put(rows.corpus)]


def _with_cache(settings: TrainSettings, corpus: Corpus, order: Order, features: str | None) -> TrainingRows:
    if features is None:
        return TrainingRows(corpus, order, None)
    cache = open_cache(features)
    audio = None
    if settings.model.audio is None:
        cache = cache.without_audio()
    elif cache.spec.audio is None:
        raise UserError(
            f"data.features={features} holds no sound, which model.audio={settings.model.audio.name} needs; run "
            f"`qformer features --set audio={settings.model.audio.name}` into another folder, or leave model.audio out"
        )
    else:
        audio = settings.data.audio.build().at(cache.spec.audio.sample_rate_hz)
    cache.spec.require_decoding(decode_settings(settings, cache.spec.preprocessing, audio))
    return TrainingRows(corpus.in_memory(functools.partial(locate, cache=cache)), order, cache)
