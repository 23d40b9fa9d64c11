"""A trained bridge on disk: what a checkpoint folder holds.

bridge.json          BridgeInfo: format version, stage, shapes, backbones, preprocessing
bridge.safetensors   the trainables alone: fp32 after training, after `qformer import` in the source's dtype
tokenizer/           the Q-Former's text tokenizer, where it has a text branch
vision/, language/   frozen backbones that lie in the checkpoint itself (after `qformer import`)
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from qformer.bridges.config import AudioConfig
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig, bridge_config
from qformer.config import AudioSpec, LanguageSpec, LoraConfig, QFormerConfig, VisionSpec
from qformer.conversion.former_info import bridge_values, nested_specs
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing
from qformer.text import TextTokenizer

FORMAT_VERSION = 2
"""Version that is written; 1, whose backbones were loose fields, is read too (`former_info`)."""
INFO_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "bridge.json", "bridge.safetensors", "tokenizer"
SpecT = TypeVar("SpecT", bound=VisionSpec | AudioSpec | LanguageSpec | None)
IN_CHECKPOINT = "checkpoint:"
"""Begins the name of a backbone that is a folder of the checkpoint: "checkpoint:vision"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeInfo:
    """Everything needed to rebuild the model around the trainables."""

    stage: int
    step: int
    """Optimizer steps done."""
    vision: VisionSpec
    language: LanguageSpec | None
    qformer: QFormerConfig
    preprocessing: Preprocessing
    num_frames: int
    """Frames sampled from a clip in training."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How they were chosen, as the data plane writes it; empty is its default."""
    max_text_tokens: int
    prompt: str = ""
    """Text before every answer, for the language model and, where it has a text branch, the stage-2 Q-Former."""
    answer_end_id: int | None = None
    """Token that ends an answer besides the tokenizer's end token; None: the language model's own. See LAVIS' OPT."""
    lora: LoraConfig | None = None
    bridge: BridgeConfig = IMAGE_BRIDGE
    """Kind and sizes of the bridge; `qformer` has the shapes of one image's Q-Former."""
    audio: AudioSpec | None = None
    """Frozen audio encoder of the branch for sound; None without one."""
    audio_branch: AudioConfig | None = None
    audio_sampling: Mapping[str, Any] = field(default_factory=dict)
    """Segments of sound that the audio encoder reads, in the data plane's form."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The content of bridge.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, content: str | bytes, file: str = INFO_FILE) -> "BridgeInfo":
        """Inverse of `to_json`; messages name `file`.

        Raises:
            UserError: If it is damaged, or of another format version.
        """
        try:
            values = json.loads(content)
            if (version := values["format_version"]) in (1, FORMAT_VERSION):
                values = {**(nested_specs(values) if version == 1 else values), "format_version": FORMAT_VERSION}
                values["vision"] = VisionSpec(**values["vision"])
                for name, spec in (("audio", AudioSpec), ("language", LanguageSpec)):
                    if values.get(name) is not None:
                        values[name] = spec(**values[name])
                values["qformer"] = QFormerConfig(**values["qformer"])
                values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
                video = values.pop("video", {}) if version == 1 else None
                values["bridge"] = bridge_config(values["bridge"] if video is None else bridge_values(video))
                if values.get("audio_branch") is not None:
                    values["audio_branch"] = AudioConfig(**values["audio_branch"])
                if values.get("lora") is not None:
                    values["lora"] = LoraConfig(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
                if values["stage"] == 2 and values["language"] is None:
                    raise ValueError("stage 2 without a language model")
                return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{file!r} is damaged ({error!r}); use an earlier checkpoint, or copy it again") from error
        raise UserError(
            f"{file!r} has format_version={version!r}, this version reads {FORMAT_VERSION}; use the one that wrote it"
        )


def read_info(folder: Path) -> BridgeInfo:
    """Read bridge.json; backbones that lie in the folder are named by their paths.

    Raises:
        UserError: If the folder is no checkpoint, a damaged one, or of another format version.
    """
    file = folder / INFO_FILE
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is no checkpoint (no {INFO_FILE}); give a run or checkpoint folder")
    info = BridgeInfo.from_json(file.read_bytes(), str(file))
    specs = {name: _resolved(folder, getattr(info, name)) for name in ("vision", "language", "audio")}
    return dataclasses.replace(info, **specs)


def _resolved(folder: Path, spec: SpecT) -> SpecT:
    if spec is None or not spec.name.startswith(IN_CHECKPOINT):
        return spec
    return dataclasses.replace(spec, name=str(folder / spec.name.removeprefix(IN_CHECKPOINT)))


def save_bridge(folder: Path, info: BridgeInfo, weights: Mapping[str, Tensor], tokenizer: TextTokenizer | None) -> None:
    """Write the three parts into an existing folder; `weights` is the trainables' state dict."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / WEIGHTS_FILE)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER_FOLDER)
    (folder / INFO_FILE).write_text(info.to_json())


def load_weights(trainables: nn.Module, folder: Path) -> None:
    """Load bridge.safetensors of the same stage and shapes.

    Raises:
        UserError: If names or shapes differ, naming the first.
    """
    weights, own = read_weights(folder), trainables.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        theirs, ours = (tuple(t[name].shape) if name in t else "absent" for t in (weights, own))
        if theirs != ours:
            raise UserError(
                f"{str(folder)!r}: {name} is {theirs} there but {ours} in the model; the model settings differ"
            )
    trainables.load_state_dict(weights)


def read_weights(folder: Path, name: str = WEIGHTS_FILE) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file, by default the trainables.

    Raises:
        UserError: If the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return cast(dict[str, Tensor], load_file(folder / name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(folder / name)!r} is missing or damaged ({error}); copy it there again") from error
