"""What an import yields, the rules it must pass, and how it is written as a checkpoint of ours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer.bridge import INFO_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, BridgeInfo
from qformer.config import QFormerConfig
from qformer.errors import UserError
from qformer.stage1 import Stage1
from qformer.stage2 import Stage2
from qformer.text import TextTokenizer

_FRESH_SEED = 0
_NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What the files cannot tell, and which mismatches are wanted."""

    vision: str | None = None
    """timm encoder for files that hold none (LAVIS)."""
    vision_pretrained: bool = True
    vision_layer: int = -2
    """Block of `vision` whose output the bridge was trained on."""
    language: str | None = None
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
class ConversionReport:
    """What became of every tensor of the source and of our model."""

    loaded: list[str]
    left_out: list[str]
    """The source's, left out on purpose: buffers, tied copies, a backbone named by the user."""
    fresh: list[str]
    """Ours, absent from the source: initialised anew."""
    unexpected: list[str]
    """The source's, of which we know nothing."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        groups = (("left out", self.left_out), ("initialised anew", self.fresh), ("unexpected", self.unexpected))
        lines = [f"loaded {len(self.loaded)} tensors", *(f"{title}: {shown(names)}" for title, names in groups)]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, slots=True)
class Bundle:
    """An imported bridge, not yet written."""

    info: BridgeInfo
    weights: dict[str, Tensor]
    tokenizer: TextTokenizer | None
    report: ConversionReport


def shown(names: Iterable[str]) -> str:
    """A list of names for people: the number and the first few."""
    names = sorted(names)
    if not names:
        return "none"
    rest = len(names) - _NAMES_SHOWN
    return f"{len(names)} ({', '.join(names[:_NAMES_SHOWN])}{f' and {rest} more' if rest > 0 else ''})"


def reason_of(error: Exception) -> str:
    """First line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def own_state(stage: int, config: QFormerConfig, language_width: int, *, device: str = "meta") -> dict[str, Tensor]:
    """Names and shapes of a bridge's tensors; on "cpu" their initial values too."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(_FRESH_SEED)
        model = Stage1(config) if stage == 1 else Stage2(config, language_width=language_width)
        return dict(model.state_dict())


def complete(
    source: Path,
    found: Mapping[str, Tensor],
    left_out: Iterable[str],
    unexpected: Iterable[str],
    options: ImportOptions,
    *,
    stage: int,
    config: QFormerConfig,
    language_width: int,
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Check what was found against our model and fill up what is missing, if that is wanted.

    Raises:
        UserError: If a shape differs, or something is missing or unexpected that `options` do not allow.
    """
    own = own_state(stage, config, language_width)
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"source: {name} is {tuple(tensor.shape)} in {str(source)!r} but {tuple(own[name].shape)} by its own "
                "other tensors and config; the file is damaged or of another kind of model"
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
    fresh = own_state(stage, config, language_width, device="cpu") if missing else {}
    weights = {name: found[name] if name in found else fresh[name] for name in own}
    return weights, ConversionReport(sorted(found), sorted(left_out), missing, surplus)


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write a checkpoint of ours; tensors keep the dtype they came in."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in bundle.weights.items()}, folder / WEIGHTS_FILE)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(folder / TOKENIZER_FOLDER)
    (folder / INFO_FILE).write_text(bundle.info.to_json())


def read_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder with one or several weight files, in their own dtypes.

    safetensors where there are any; else PyTorch files, read as weights only: a pickle that would run code is refused.

    Raises:
        UserError: If there is no weight file, or one holds more than tensors.
    """
    from safetensors.torch import load_file

    files = [source]
    if source.is_dir():
        # Optimizer states and our own side file may lie beside the model's files.
        files = sorted(source.glob("model*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files or not files[0].is_file():
        raise UserError(f"source: no weight file at {str(source)!r}; give a LAVIS file or a Hugging Face folder")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file) if file.suffix == ".safetensors" else _tensors_of_pickle(file)
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
