"""The bridges behind one frozen encoder and language model: what each is, and which of them can share the backbones."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.data import storage
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings, Limits
from pipelines.serving.contract.errors import ApiError
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing

if TYPE_CHECKING:  # it loads torch, which the ingress has no use for
    from qformer.conversion.checkpoint import BridgeInfo

_BESIDE = "checkpoint:"
"""`qformer.conversion.checkpoint.BESIDE`: a backbone that is a folder of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One checkpoint: a Q-Former with its projection (stage 2) or its heads (stage 1). Knows no torch."""

    name: str
    """As requests choose it; stays when a newer checkpoint takes its place."""
    version: str
    """Which checkpoint it is, as answers tell it: "RUN/step-00000400"; requests may ask for it, too."""
    folder: str
    """Folder or URI that every node can read."""
    stage: int
    prompt: str
    """What takes the place of a missing instruction."""
    preprocessing: Preprocessing
    num_frames: int
    sampling: Mapping[str, Any]
    audio_sampling: Mapping[str, Any] | None
    """How sound is read, where the bridge has a branch for it."""
    num_queries: int
    embed_dim: int
    """Of a stage-1 embedding."""
    encoder: Mapping[str, Any]
    """Which frozen vision encoder it was trained on."""
    language: Mapping[str, Any]
    """Which language model; of stage 1: none."""
    has_lora: bool

    @classmethod
    def of(cls, info: "BridgeInfo", *, name: str, version: str, folder: str) -> "Adapter":
        """Describe a checkpoint by its bridge.json."""
        language = None if info.language is None else _resolved(folder, info.language)
        return cls(
            name=name,
            version=version,
            folder=folder,
            stage=info.stage,
            prompt=info.prompt,
            preprocessing=info.preprocessing,
            num_frames=info.num_frames,
            sampling=dict(info.sampling),
            audio_sampling=dict(info.audio_sampling) if info.audio_sampling else None,
            num_queries=info.qformer.num_queries,
            embed_dim=info.qformer.embed_dim,
            encoder={
                "vision": _resolved(folder, info.vision),
                "vision_pretrained": info.vision_pretrained,
                "vision_layer": info.vision_layer,
                "vision_image_size": info.vision_image_size,
                "width": info.qformer.encoder_width,
            },
            language={"language": language, "answer_end_id": info.answer_end_id} if info.stage == 2 else {},
            has_lora=info.lora is not None,
        )

    @property
    def key(self) -> str:
        """Tells checkpoints apart by their folder, and tells nobody where that lies."""
        return f"{self.name}@{hashlib.sha256(self.folder.encode()).hexdigest()[:12]}"

    @property
    def generates(self) -> bool:
        """Whether it answers in text (stage 2), or embeds and matches (stage 1)."""
        return self.stage == 2

    def decode_settings(self, limits: Limits) -> DecodeSettings:
        """How files become this adapter's pixels: as in its training."""
        return DecodeSettings(
            preprocessing=self.preprocessing,
            num_frames=self.num_frames,
            sampling=Sampling.from_dict(self.sampling),
            limits=limits,
            audio=AudioSampling.from_dict(self.audio_sampling) if self.audio_sampling else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Adapter":
        """Rebuild from `to_dict` output or its JSON."""
        return cls(**{**values, "preprocessing": Preprocessing.from_dict(values["preprocessing"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbones:
    """The frozen models that adapters share; they stay when a newer checkpoint takes another's place."""

    encoder: dict[str, Any]
    """`Adapter.encoder`."""
    language: dict[str, Any] | None
    """`Adapter.language`; None where no adapter answers in text."""
    updated_by: str | None = None
    """Checkpoint whose updates (LoRA) the language model carries."""

    @classmethod
    def of(cls, adapters: Sequence[Adapter]) -> "Backbones":
        """Those of adapters that share them (`require_shared_backbones`)."""
        writers = [adapter for adapter in adapters if adapter.generates]
        return cls(
            encoder=dict(adapters[0].encoder),
            language=dict(writers[0].language) if writers else None,
            updated_by=writers[0].folder if writers and writers[0].has_lora else None,
        )


class AdapterTable:
    """All adapters of a service, the default first.

    Args:
        adapters: At least one.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.all = tuple(adapters)
        self._by_name = {adapter.version: adapter for adapter in reversed(self.all)}
        self._by_name |= {adapter.name: adapter for adapter in self.all}

    @property
    def default(self) -> Adapter:
        """The one that task endpoints take when a request names none."""
        return self.all[0]

    def find(self, name: str | None, *, generates: bool) -> Adapter:
        """The adapter of a request, by name or version; with None the first that can do the task.

        Raises:
            ApiError: 404 when there is none, 400 when it is of the other stage.
        """
        able = [adapter for adapter in self.all if adapter.generates == generates]
        task, stage = ("answers in text", 2) if generates else ("embeds and matches", 1)
        names = ", ".join(repr(adapter.name) for adapter in able) or "none here"
        if name is None and able:
            return able[0]
        if name is None:
            raise ApiError(404, "model_not_found", f"no model of this server {task} (stage {stage})", param="model")
        if (found := self._by_name.get(name)) is None:
            message = f"the model {name[:100]!r} does not exist; GET /v1/models lists all; for this endpoint: {names}"
            raise ApiError(404, "model_not_found", message, param="model")
        if found not in able:
            message = f"the model {found.name!r} is of stage {found.stage}; this endpoint wants stage {stage}: "
            raise ApiError(400, "wrong_model", message + names, param="model")
        return found


def require_shared_backbones(adapters: Sequence[Adapter]) -> None:
    """Check that one frozen encoder and one frozen language model serve all adapters.

    Raises:
        UserError: Names the first that does not fit, or whose name is taken.
    """
    names = [adapter.name for adapter in adapters]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"adapters: the name {name!r} is given twice; give every checkpoint a name of its own")
    first = adapters[0]
    writers = [adapter for adapter in adapters if adapter.generates]
    for other in adapters:
        if other.encoder != first.encoder:
            theirs, ours = _difference(other.encoder, first.encoder)
            raise UserError(
                f"adapters: {other.name!r} has another vision encoder ({theirs}) than {first.name!r} ({ours}); serve "
                "it on its own"
            )
    for other in writers:
        if other.language != writers[0].language:
            theirs, ours = _difference(other.language, writers[0].language)
            raise UserError(
                f"adapters: {other.name!r} has another language model ({theirs}) than {writers[0].name!r} ({ours}); "
                "serve it on its own"
            )
        if other.has_lora and len(writers) > 1:
            raise UserError(
                f"adapters: {other.name!r} changes the language model (model.lora), which all others share; serve it "
                "on its own, or merge its updates with `qformer export`"
            )


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, str]:
    name = next(name for name in ours if theirs[name] != ours[name])
    return f"{name}={theirs[name]!r}", f"{name}={ours[name]!r}"


def _resolved(folder: str, name: str) -> str:
    return storage.join(folder, name.removeprefix(_BESIDE)) if name.startswith(_BESIDE) else name
