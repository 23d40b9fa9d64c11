"""Checks of the settings and the data before any worker starts."""

import functools

import numpy as np

from jobs.settings.model import LossWeightSettings
from jobs.settings.train import TrainSettings
from pipelines.data import schema, storage
from pipelines.data.failures import MediaError
from pipelines.data.order.mixture import Corpus
from pipelines.data.storage import checkpoint_folders, members
from pipelines.data.storage.retries import with_retries
from qformer.config import CACHED_AUDIO
from qformer.errors import UserError


def check(settings: TrainSettings, num_rows: int) -> None:
    """Refuse settings that cannot work together, or with the data.

    Args:
        settings: Settings of the run.
        num_rows: Rows of an epoch.

    Raises:
        UserError: Naming the first mistake.
    """
    _check_batch(settings, num_rows)
    augmentation = settings.data.augmentation
    if settings.data.features and (augmentation.random_resized_crop or augmentation.horizontal_flip):
        raise UserError(
            "data.features holds the encoder's view of the plain picture, so data.augmentation cannot change it; "
            "leave one of them out"
        )
    if settings.stage == 2 and settings.model.language is None:
        raise UserError("model.language is not set; stage 2 needs a language model (hub name or folder)")
    if settings.stage == 1:
        _check_stage_1(settings)
    if settings.model.audio is not None and settings.model.audio.is_cached and settings.data.features is None:
        raise UserError(
            f"model.audio={CACHED_AUDIO} reads the vectors in a feature cache; set data.features, or name an encoder"
        )
    _check_bridge(settings)
    _check_video(settings)
    if settings.init_from is not None:
        checkpoint_folders.newest_checkpoint(settings.init_from)


def require_media_answer(corpus: Corpus) -> None:
    """Ask each store that holds media for the first file of a source, before workers wait for it row by row.

    Raises:
        UserError: If it refuses, or does not answer. A file that is missing says nothing of the others.
    """
    asked: set[str] = set()
    for source in corpus.sources:
        media = source.rows.take(np.zeros(1, dtype=np.int64))[schema.MEDIA][0].as_py()
        if media is None or storage.is_local(media):
            continue
        member = members.parse(media)
        uri = media if member is None else member.shard
        if (store := "/".join(uri.split("/")[:3])) in asked:
            continue
        asked.add(store)
        try:
            with_retries(uri, functools.partial(storage.size_bytes, uri))
        except MediaError as error:
            if error.error_class in ("config", "transient"):
                reason = error.message.removeprefix(f"{uri}: ")
                raise UserError(f"the media of data.manifest cannot be read: {uri}: {reason}") from error


def _check_bridge(settings: TrainSettings) -> None:
    bridge = settings.model.bridge
    if settings.stage not in bridge.stages:
        able = " and ".join(map(str, sorted(bridge.stages)))
        raise UserError(
            f"model.bridge.kind={bridge.kind} belongs to stage {able}; set stage={min(bridge.stages)}, or another kind"
        )
    if settings.init_from is None and (name := bridge.keeps_loaded) is not None:
        raise UserError(
            f"model.bridge.{name}=true with kind={bridge.kind} keeps weights as they were trained: set init_from to a "
            f"run, or {name}=false to train them too"
        )
    known = {*LossWeightSettings.model_fields, *bridge.term_names}
    if unknown := sorted(settings.optim.loss_weights.by_name().keys() - known):
        raise UserError(
            f"optim.loss_weights.{unknown[0]} is no loss of a bridge of kind={bridge.kind}; the losses are "
            f"{', '.join(sorted(known - {'is_learned'}))}"
        )


def _check_video(settings: TrainSettings) -> None:
    model, is_fresh = settings.model, settings.init_from is None
    segments, frames = settings.data.audio.num_segments, settings.data.num_frames
    if model.audio is not None and model.audio_branch.is_joint and segments != frames:
        raise UserError(
            f"model.audio_branch.is_joint=true reads sound with the frames, one segment a frame, but "
            f"data.audio.num_segments={segments} and data.num_frames={frames}; make them equal"
        )
    if model.audio_branch.trains_alone and (model.audio is None or is_fresh):
        raise UserError(
            "model.audio_branch.trains_alone=true trains a branch of a trained bridge: set model.audio to an audio "
            "encoder and init_from to a run"
        )


def manifests(settings: TrainSettings) -> list[tuple[str, float | None]]:
    """Path and weight of each manifest."""
    manifest = settings.data.manifest
    if isinstance(manifest, str):
        return [(manifest, None)]
    return [(one.path, one.weight) for one in manifest]


def _check_batch(settings: TrainSettings, num_rows: int) -> None:
    if settings.batch_size > num_rows:
        raise UserError(
            f"batch_size={settings.batch_size} is larger than the {num_rows} rows of split {settings.data.split!r} in "
            f"{', '.join(path for path, _ in manifests(settings))}; lower it"
        )
    if settings.min_workers is not None and settings.min_workers > settings.workers:
        raise UserError(
            f"min_workers={settings.min_workers} is more than workers={settings.workers}, the most there are; lower it"
        )
    if settings.batch_size < settings.workers:
        raise UserError(
            f"batch_size={settings.batch_size} gives some of the {settings.workers} workers nothing; raise it"
        )


def _check_stage_1(settings: TrainSettings) -> None:
    if settings.model.lavis_reduction and settings.min_workers is not None:
        raise UserError(
            "model.lavis_reduction reduces over each worker's own samples, whose number min_workers changes; leave one "
            "of them out"
        )
    if settings.model.lavis_reduction and settings.micro_batch is not None:
        raise UserError(
            "model.lavis_reduction reduces over what a worker computes at a time, which micro_batch changes; leave one "
            "of them out"
        )
    for name in ("lora", "freeze_qformer", "qformer_reads_prompt", "audio"):
        if getattr(settings.model, name):
            raise UserError(f"model.{name} belongs to stage 2, which has a language model; leave it out of stage 1")
