"""Inputs of a training run from its settings: paths, tokenizer, model and decoding."""

import dataclasses

from jobs.folders.backbones import absolute_name, with_absolute_name
from jobs.settings.model import ModelSettings
from jobs.settings.train import TrainSettings
from pipelines.data import storage
from pipelines.data.media.audio_sampling import AudioSampling, AudioSegments
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings
from pipelines.training.run.model_choice import ModelChoice
from qformer.preprocessing import Preprocessing

TOKENIZER_FOLDER = "tokenizer"
LEARN_TOKENIZER = "corpus"


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """Workers run in other folders: make every local path absolute. Hub names and URIs stay as they are."""

    def absolute(path: str | None) -> str | None:
        return path and absolute_name(path)

    model = settings.model
    folders = {
        "vision": with_absolute_name(model.vision),
        "audio": model.audio and with_absolute_name(model.audio),
        "language": model.language and with_absolute_name(model.language),
        "tokenizer": LEARN_TOKENIZER if model.tokenizer == LEARN_TOKENIZER else absolute(model.tokenizer),
        "qformer_init": absolute(model.qformer_init),
    }
    output = storage.local_path(settings.output) if storage.is_local(settings.output) else settings.output
    return settings.model_copy(
        update={
            "output": output,
            "data": settings.data.model_copy(update={"features": absolute(settings.data.features)}),
            "validation": settings.validation
            and settings.validation.model_copy(update={"features": absolute(settings.validation.features)}),
            "init_from": absolute(settings.init_from),
            "model": model.model_copy(update=folders),
        }
    )


def model_choice(
    model: ModelSettings,
    *,
    stage: int,
    num_frames: int,
    tokenizer: str,
    sampling: Sampling | None = None,
    segments: AudioSegments | None = None,
) -> ModelChoice:
    """The frozen models and the bridge that the settings name.

    Args:
        model: Settings of the model.
        stage: Stage of the training.
        num_frames: Frames of a clip.
        tokenizer: Hub name or folder of the Q-Former's tokenizer.
        sampling: Choice of a clip's frames; None: the default.
        segments: Segments of a clip's sound; None: the default.
    """
    shared = {one.name for one in dataclasses.fields(ModelChoice)} & type(model).model_fields.keys() - {"tokenizer"}
    return ModelChoice(
        stage=stage,
        num_frames=num_frames,
        tokenizer=tokenizer,
        sampling=sampling or Sampling(),
        segments=segments or AudioSegments(),
        **{name: getattr(model, name) for name in shared},
    )


def decode_settings(
    settings: TrainSettings, preprocessing: Preprocessing, audio: AudioSampling | None
) -> DecodeSettings:
    """Decoding of this run's files to pixels and, with an audio encoder, sound."""
    data = settings.data
    return DecodeSettings(
        preprocessing=preprocessing,
        num_frames=data.num_frames,
        sampling=data.sampling,
        limits=data.limits,
        augmentation=data.augmentation,
        audio=audio,
    )


def tokenizer_folder(settings: TrainSettings) -> str:
    """Hub name or folder of the Q-Former's tokenizer; in the run's own folder where it is learned."""
    if settings.model.tokenizer != LEARN_TOKENIZER:
        return settings.model.tokenizer
    return storage.join(settings.output, TOKENIZER_FOLDER)
