"""What an import yields, and the rules it must pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer.config import LanguageSpec, QFormerConfig, VisionSpec
from qformer.conversion.checkpoint import BridgeInfo, read_weights, save_bridge
from qformer.conversion.report import LoadReport, shown
from qformer.errors import UserError
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from qformer.text import TextTokenizer

_FRESH_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What the files cannot tell, and which mismatches are wanted."""

    vision: VisionSpec | None = None
    """timm encoder, and the block that the bridge was trained on, for files that hold none (LAVIS)."""
    language: LanguageSpec | None = None
    """Language model for files that hold none (LAVIS)."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of a LAVIS stage-1 file."""
    num_heads: int | None = None
    """Attention heads of a LAVIS Q-Former; None takes BERT's 64 channels a head."""
    prompt: str = ""
    num_frames: int = 8
    max_text_tokens: int = 32
    allow_fresh: bool = False
    """Initialise what the source lacks instead of refusing it."""
    allow_unexpected: bool = False
    """Leave out what we have no place for instead of refusing it."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An imported bridge, not yet written."""

    info: BridgeInfo
    trainables: Stage1 | Stage2
    """Each tensor in the dtype that it came in."""
    tokenizer: TextTokenizer | None
    report: LoadReport

    def save(self, folder: Path) -> None:
        """Write it as a checkpoint of ours."""
        folder.mkdir(parents=True, exist_ok=True)
        save_bridge(folder, self.info, self.trainables.state_dict(), self.tokenizer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The bridge of ours that a source holds."""

    stage: int
    config: QFormerConfig
    language_width: int
    """Of stage 2."""

    def build(self, device: str = "meta") -> Stage1 | Stage2:
        """Names and shapes of its tensors; on "cpu" their initial values too."""
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(_FRESH_SEED)
            if self.stage == 1:
                return Stage1(self.config)
            return Stage2(self.config, language_width=self.language_width)

    def fill(
        self,
        source: Path,
        found: Mapping[str, Tensor],
        left_out: Iterable[str],
        unexpected: Iterable[str],
        options: ImportOptions,
    ) -> tuple[Stage1 | Stage2, LoadReport]:
        """Build it of what was found, and of initial values where something is missing and that is wanted.

        Raises:
            UserError: If a shape differs, or something is missing or unexpected that `options` do not allow.
        """
        model = self.build()
        own = model.state_dict()
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"source: {name} is {tuple(tensor.shape)} in {str(source)!r} but {tuple(own[name].shape)} by its "
                    "own other tensors and config; the file is damaged or of another kind of model"
                )
        missing, surplus = sorted(own.keys() - found.keys()), sorted(unexpected)
        if missing and not options.allow_fresh:
            raise UserError(
                f"source: {str(source)!r} lacks {shown(missing)}; add --set allow_fresh=true to initialise them anew"
            )
        if surplus and not options.allow_unexpected:
            raise UserError(
                f"source: {str(source)!r} holds tensors we have no place for: {shown(surplus)}; "
                "add --set allow_unexpected=true to leave them out"
            )
        fresh = self.build("cpu").state_dict() if missing else {}
        model.load_state_dict({name: found[name] if name in found else fresh[name] for name in own}, assign=True)
        report = LoadReport(
            source=repr(str(source)),
            loaded=sorted(found),
            missing=missing,
            left_out=sorted(left_out),
            unexpected=surplus,
        )
        return model, report


def reason_of(error: Exception) -> str:
    """First line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder with one or several weight files, in their own dtypes.

    safetensors where there are any; else PyTorch files, read as weights only: a pickle that would run code is refused.

    Raises:
        UserError: If there is no weight file, one is damaged, or holds more than tensors.
    """
    files = [source]
    if source.is_dir():
        # Optimizer states and our own side file may lie beside the model's files.
        files = sorted(source.glob("model*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files or not files[0].is_file():
        raise UserError(f"source: no weight file at {str(source)!r}; give a LAVIS file or a Hugging Face folder")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_weights(file.parent, file.name) if file.suffix == ".safetensors" else _tensors_of_pickle(file)
    return weights


def _tensors_of_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"source: {str(file)!r} cannot be read as weights only ({reason_of(error)}); it is damaged, or holds "
            "objects that would run code: save its state dict alone with a version you trust"
        ) from error
    # LAVIS keeps the state dict under "model", beside optimizer and settings.
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"source: {str(file)!r} holds no state dict (nor one under 'model'); give a checkpoint file")
    return content
