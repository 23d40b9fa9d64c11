"""An imported bridge, the options of an import, and the checks of names and shapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer.config import LanguageSpec, QFormerConfig, VisionSpec
from qformer.conversion.checkpoint import BridgeInfo, read_weights, save_bridge
from qformer.conversion.report import LoadReport, format_names
from qformer.errors import UserError
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from qformer.text import TextTokenizer

_FRESH_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """Values that the files do not hold, and mismatches that are allowed."""

    vision: VisionSpec | None = None
    """timm encoder, and the block that the bridge was trained on, for files without one (LAVIS)."""
    language: LanguageSpec | None = None
    """Language model for files without one (LAVIS)."""
    tokenizer: str = "bert-base-uncased"
    """Text tokenizer of a LAVIS stage-1 file."""
    num_heads: int | None = None
    """Attention heads of a LAVIS Q-Former; None for BERT's 64 channels a head."""
    prompt: str = ""
    num_frames: int = 8
    max_text_tokens: int = 32
    allow_fresh: bool = False
    """Whether tensors that the source lacks are initialised instead of refused."""
    allow_unexpected: bool = False
    """Whether tensors without a counterpart are skipped instead of refused."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An imported bridge in memory."""

    info: BridgeInfo
    trainables: Stage1 | Stage2
    """Trainables, each tensor in the source's dtype."""
    tokenizer: TextTokenizer | None
    report: LoadReport

    def save(self, folder: Path) -> None:
        """Write the bridge as a checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_bridge(folder, self.info, self.trainables.state_dict(), self.tokenizer)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportTarget:
    """Stage and shapes of the bridge that a source holds."""

    stage: int
    config: QFormerConfig
    language_width: int
    """Width of the language model's embeddings; unused in stage 1."""

    def build(self, device: str = "meta") -> Stage1 | Stage2:
        """Build the trainables: names and shapes on "meta", initial values too on "cpu"."""
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
        """Build the trainables from the tensors found, and initialise missing ones where `options` allow it.

        Args:
            source: File or folder of the source, for messages.
            found: Tensors of the source by the trainables' names.
            left_out: Names in the source that are skipped on purpose.
            unexpected: Names in the source without a counterpart.
            options: Mismatches that are allowed.

        Raises:
            UserError: If a shape differs, or a tensor is missing or unexpected and `options` do not allow it.
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
                f"source: {str(source)!r} lacks {format_names(missing)}; "
                "add --set allow_fresh=true to initialise them anew"
            )
        if surplus and not options.allow_unexpected:
            raise UserError(
                f"source: {str(source)!r} holds tensors we have no place for: {format_names(surplus)}; "
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


def first_line(error: Exception) -> str:
    """First line of another library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder with one or several weight files, in their own dtypes.

    safetensors files take precedence over PyTorch files, which are read as weights only: a pickle that would run code
    is refused.

    Raises:
        UserError: If there is no weight file, one is damaged, or holds more than tensors.
    """
    files = [source]
    if source.is_dir():
        # The folder may also hold optimizer states and a side file.
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
            f"source: {str(file)!r} cannot be read as weights only ({first_line(error)}); it is damaged, or holds "
            "objects that would run code: save its state dict alone with a version you trust"
        ) from error
    # LAVIS keeps the state dict under "model", beside optimizer and settings.
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"source: {str(file)!r} holds no state dict (nor one under 'model'); give a checkpoint file")
    return content
