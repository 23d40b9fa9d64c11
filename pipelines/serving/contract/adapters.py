"""Descriptions of served checkpoints, and the check that they can share one frozen encoder and language model."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.data import storage
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings, Limits
from pipelines.serving.contract.errors import ApiError
from qformer.config import LanguageSpec, VisionSpec
from qformer.conversion.former_info import nested_specs
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing

if TYPE_CHECKING:  # loads torch, which the ingress does without
    from qformer.conversion.checkpoint import BridgeInfo

SpecT = TypeVar("SpecT", VisionSpec, LanguageSpec)
_BUNDLED = "checkpoint:"
"""Prefix of a backbone that is a folder inside the checkpoint; a copy of the constant in
`qformer.conversion.checkpoint`, whose import would load torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedEncoder:
    """The frozen vision encoder that adapters share."""

    vision: VisionSpec
    """Its name is a hub name, a folder or a URI."""
    width: int
    """Width of its tokens."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SharedEncoder":
        """Rebuild from JSON, also from that of configs whose encoder was five loose fields."""
        if not isinstance(values["vision"], Mapping):
            values = nested_specs(values)
        return cls(vision=VisionSpec(**values["vision"]), width=values["width"])


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedLanguage:
    """The frozen language model that adapters share."""

    language: LanguageSpec
    """Its name is a hub name, a folder or a URI."""
    answer_end_id: int | None
    """Token that ends an answer besides the tokenizer's own; None: none."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "SharedLanguage | None":
        """Rebuild from JSON, also from that of configs which named the language model by a string; None of nothing."""
        if not values:
            return None
        language = values["language"]
        spec = LanguageSpec(language) if isinstance(language, str) else LanguageSpec(**language)
        return cls(language=spec, answer_end_id=values["answer_end_id"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Description of one checkpoint: a Q-Former with its projection (stage 2) or its heads (stage 1). Free of torch."""

    name: str
    """Name that requests use; a newer checkpoint may take it over."""
    version: str
    """Checkpoint that answers report, such as "RUN/step-00000400"; requests may name it too."""
    folder: str
    """Folder or URI, readable from every node."""
    stage: int
    prompt: str
    """Prompt of training; used where a request has no instruction."""
    preprocessing: Preprocessing
    num_frames: int
    sampling: Mapping[str, Any]
    audio_sampling: Mapping[str, Any] | None
    """Sampling of sound; None where the bridge has no audio branch."""
    num_queries: int
    embed_dim: int
    """Width of a stage-1 embedding."""
    encoder: SharedEncoder
    """Frozen vision encoder of its training."""
    language: SharedLanguage | None
    """Frozen language model of its training; None in stage 1."""
    has_lora: bool

    @classmethod
    def of(cls, info: "BridgeInfo", *, name: str, version: str, folder: str) -> "Adapter":
        """Build the description from a checkpoint's bridge.json."""
        language = None
        if info.stage == 2 and info.language is not None:
            language = SharedLanguage(language=_resolved(folder, info.language), answer_end_id=info.answer_end_id)
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
            encoder=SharedEncoder(vision=_resolved(folder, info.vision), width=info.qformer.encoder_width),
            language=language,
            has_lora=info.lora is not None,
        )

    @property
    def key(self) -> str:
        """Unique name of the checkpoint; holds a hash of the folder, not its path."""
        return f"{self.name}@{hashlib.sha256(self.folder.encode()).hexdigest()[:12]}"

    @property
    def generates(self) -> bool:
        """True: generates text (stage 2). False: embeds and matches (stage 1)."""
        return self.stage == 2

    def decode_settings(self, limits: Limits) -> DecodeSettings:
        """Decoding of media for this adapter, the same as in its training."""
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
        parsed = {
            "preprocessing": Preprocessing.from_dict(values["preprocessing"]),
            "encoder": SharedEncoder.from_dict(values["encoder"]),
            "language": SharedLanguage.from_dict(values["language"]),
        }
        return cls(**{**values, **parsed})


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbones:
    """Frozen models that all adapters share; they stay loaded when a checkpoint is replaced."""

    encoder: SharedEncoder
    language: SharedLanguage | None
    """None where no adapter generates text."""
    updated_by: str | None = None
    """Folder of the checkpoint whose LoRA updates apply to the language model; None: none."""

    @classmethod
    def from_dict(cls, values: "Mapping[str, Any] | Backbones") -> "Backbones":
        """Rebuild from JSON, also from that of configs written before; what is built already stays."""
        if isinstance(values, Backbones):
            return values
        encoder, language = SharedEncoder.from_dict(values["encoder"]), SharedLanguage.from_dict(values["language"])
        return cls(encoder=encoder, language=language, updated_by=values.get("updated_by"))

    @classmethod
    def of(cls, adapters: Sequence[Adapter]) -> "Backbones":
        """Backbones of adapters that pass `require_shared_backbones`."""
        writers = [adapter for adapter in adapters if adapter.generates]
        return cls(
            encoder=adapters[0].encoder,
            language=writers[0].language if writers else None,
            updated_by=writers[0].folder if writers and writers[0].has_lora else None,
        )


class AdapterTable:
    """All adapters of a service, the default first.

    Args:
        adapters: One or more adapters, the default first.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.all = tuple(adapters)
        self._by_name = {adapter.version: adapter for adapter in reversed(self.all)}
        self._by_name |= {adapter.name: adapter for adapter in self.all}

    @property
    def default(self) -> Adapter:
        """Adapter of requests that name none."""
        return self.all[0]

    def find(self, name: str | None, *, generates: bool) -> Adapter:
        """Find an adapter by name or version; None selects the first that can do the task.

        Raises:
            ApiError: 404 if there is none, 400 if it is of the other stage.
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
        UserError: If two have the same name, or one has other backbones; names the first such adapter.
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


def _difference(theirs: Any, ours: Any) -> tuple[str, str]:
    """The first field that differs, of nested ones the innermost, as text for both."""
    name = next(one.name for one in dataclasses.fields(ours) if getattr(theirs, one.name) != getattr(ours, one.name))
    their_value, our_value = getattr(theirs, name), getattr(ours, name)
    if dataclasses.is_dataclass(our_value):
        return _difference(their_value, our_value)
    return f"{name}={their_value!r}", f"{name}={our_value!r}"


def _resolved(folder: str, spec: SpecT) -> SpecT:
    if not spec.name.startswith(_BUNDLED):
        return spec
    return dataclasses.replace(spec, name=storage.join(folder, spec.name.removeprefix(_BUNDLED)))
