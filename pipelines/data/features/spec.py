"""Everything that decides the content of a feature cache: encoders, preprocessing, sampling, storage; and its hash."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.data import schema, storage
from pipelines.data.batches.token_codec import RAW_DTYPES, TokenDtype, raw_width
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.samples import DecodeSettings
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing

SPEC_FILE = "features.json"
FORMAT_VERSION = 3
_WITHOUT_EFFECT = ("limits", "augmentation", "uses_seeds")
"""Fields of `DecodeSettings` without effect on features: limits only fail rows, and nothing in a cache is random."""
_NAMES = ("vision", "audio_encoder")
"""Fields for people, outside the fingerprint; weights count instead."""
_OF_AUDIO = ("audio", "audio_encoder", "audio_weights", "audio_extractor", "audio_width")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """Everything that decides the features of a sample."""

    vision: str
    """Name or folder of the encoder, for people; its weights count instead."""
    weights: str
    """SHA-256 of the frozen weights in the dtype in which they run."""
    layer: int
    precision: Literal["fp32", "bf16"]
    preprocessing: Preprocessing
    num_frames: int
    sampling: Sampling
    num_tokens: int
    width: int
    dtype: TokenDtype
    audio: AudioSampling | None = None
    """Segments of sound with cached vectors; None: no sound."""
    audio_encoder: str | None = None
    """Name or folder of the audio encoder, for people."""
    audio_weights: str | None = None
    """SHA-256 of the audio encoder's weights in the dtype in which they run."""
    audio_extractor: str | None = None
    """SHA-256 of the settings of the audio encoder's feature extractor."""
    audio_width: int = 0
    """Width of the audio encoder's vectors."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all but the encoders' names."""
        values = {name: value for name, value in self.to_dict().items() if name not in _NAMES}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, the inverse of `from_dict`; without sound, its fields are left out."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _OF_AUDIO or self.audio is not None}

    def without_audio(self) -> "FeatureSpec":
        """The spec of the same cache without its audio vectors."""
        return dataclasses.replace(
            self, audio=None, audio_encoder=None, audio_weights=None, audio_extractor=None, audio_width=0
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FeatureSpec":
        """Rebuild from `to_dict` output or its JSON."""
        preprocessing, sampling = (
            Preprocessing.from_dict(values["preprocessing"]),
            Sampling.from_dict(values["sampling"]),
        )
        audio = AudioSampling.from_dict(values["audio"]) if values.get("audio") is not None else None
        return cls(**{**values, "preprocessing": preprocessing, "sampling": sampling, "audio": audio})

    def row_bytes(self, kind: str) -> int:
        """Bytes of one sample in the cache."""
        sound = self.audio.num_segments * self.raw_audio_width if self.audio is not None and kind == schema.VIDEO else 0
        return (math.prod(self.raw_shape(kind)) + sound) * RAW_DTYPES[self.dtype].itemsize

    def require_same(self, cached: "FeatureSpec") -> None:
        """Reject a cache of another encoder, preprocessing or sampling.

        Args:
            cached: Spec of the cache.

        Raises:
            UserError: If they differ; the message names the differences.
        """
        if self.fingerprint == cached.fingerprint:
            return
        mine, theirs = self.to_dict(), cached.to_dict()
        names = [name for name in {**mine, **theirs} if name not in _NAMES]
        differences = ", ".join(
            f"{name}: {_short(getattr(cached, name))} in the cache, {_short(getattr(self, name))} here"
            for name in names
            if mine.get(name) != theirs.get(name)
        )
        raise UserError(f"the feature cache does not fit ({differences}); run `qformer features` into another folder")

    def require_decoding(self, decode: DecodeSettings) -> None:
        """Check that the fingerprint covers all decode settings that decide pixels.

        Args:
            decode: Decode settings of the rows.

        Raises:
            TypeError: If `DecodeSettings` has a field that decides pixels and is missing here.
            UserError: If a value differs, or frames are drawn at random in every epoch.
        """
        if decode.sampling.is_random:
            raise UserError(
                f"sampling.strategy={decode.sampling.strategy!r} draws other frames in every epoch, and a cache holds "
                "one choice; take 'uniform', or train on pixels"
            )
        for field in dataclasses.fields(DecodeSettings):
            if field.name in _WITHOUT_EFFECT:
                continue
            if field.name not in {own.name for own in dataclasses.fields(self)}:
                raise TypeError(
                    f"DecodeSettings.{field.name} decides what a sample looks like, so FeatureSpec needs it as well"
                )
            wanted, mine = getattr(decode, field.name), getattr(self, field.name)
            if wanted != mine:
                raise UserError(
                    f"the feature cache does not fit ({field.name}: {_short(mine)} in the cache, {_short(wanted)} "
                    "here); run `qformer features` into another folder"
                )

    def raw_shape(self, kind: str) -> tuple[int, int, int]:
        """Stored shape: [frames, tokens, items a token]."""
        frames = self.num_frames if kind == schema.VIDEO else 1
        return frames, self.num_tokens, raw_width(self.width, self.dtype)

    @property
    def raw_audio_width(self) -> int:
        """Number of stored items of a segment's vector."""
        return raw_width(self.audio_width, self.dtype)


def read_spec(folder: str) -> FeatureSpec | None:
    """Read the spec of the cache in `folder`; None when there is none.

    Raises:
        UserError: If its format has another version.
    """
    path = storage.join(folder, SPEC_FILE)
    if not storage.exists(path):
        return None
    with storage.open_input(path) as file:
        values = json.load(file)
    if values["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"feature cache {folder} has format {values['format_version']}, this version reads {FORMAT_VERSION}; "
            "run `qformer features` again into another folder"
        )
    return FeatureSpec.from_dict(values["spec"])


def write_spec(folder: str, spec: FeatureSpec) -> None:
    """Write the spec of a cache, before its first shard."""
    values = {"format_version": FORMAT_VERSION, "fingerprint": spec.fingerprint, "spec": spec.to_dict()}
    storage.write_text(storage.join(folder, SPEC_FILE), json.dumps(values, indent=2) + "\n")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 60 else text
