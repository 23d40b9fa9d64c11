"""Checkpoints on any filesystem: a copy of the run between two steps, written completely or not at all.

RUN/checkpoints/step-00000500/
    bridge.json, bridge.safetensors, tokenizer/   the model (`qformer.conversion.checkpoint`)
    training.pt                                   `TrainingState`: optimizer, accounting, quarantine, loss scale, ...
    settings.yaml                                 resolved settings of the run
    complete.json                                 written last: see `pipelines.data.storage.checkpoint_folders`
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor, nn

from pipelines.data import storage
from pipelines.data.storage.checkpoint_folders import CHECKPOINTS_FOLDER, COMPLETE_MARKER, checkpoint_uri, write_marker
from pipelines.data.storage.retries import with_retries
from qformer.conversion.checkpoint import FORMAT_VERSION, BridgeInfo, load_weights, read_info, save_bridge
from qformer.errors import UserError
from qformer.text import TextTokenizer

TRAINING_FILE, SETTINGS_FILE = "training.pt", "settings.yaml"
_UNFINISHED = ".unfinished-"


_BACKBONES = ("vision", "language", "audio")
_MODEL_FIELDS = tuple(entry.name for entry in fields(BridgeInfo) if entry.name not in ("step", "format_version"))


@dataclass(slots=True)
class TrainingState:
    """State that a run needs in order to resume, except its trainables."""

    step: int
    """Optimizer steps done; the position in the data is a function of it."""
    optimizer: dict[str, Any]
    accounting: dict[str, Any]
    """`Accounting.state()` of the surviving trajectory."""
    order: str
    """Fingerprint of what decides the order of samples."""
    raw_weights: dict[str, Tensor] | None = None
    """Trainables of the last step, where the checkpoint's weights are their moving average."""
    log_variances: Tensor | None = None
    """Learned weights of the objective; None where its weights are fixed."""
    frozen: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the backbones' weights, by name; empty in checkpoints of older versions."""
    workers: int = 0
    """Number of ranks at that step; 0 in checkpoints of older versions."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 loss scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Copy of a run between two steps, independent of further training."""

    info: BridgeInfo
    weights: dict[str, Tensor]
    """The trainables, or their moving average where there is one."""
    tokenizer: TextTokenizer | None
    state: TrainingState
    settings_yaml: str


def copy_to_cpu(value: Any) -> Any:
    """Copy nested dicts and lists, with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(item) for item in value)
    return value


def write_checkpoint(output: str, checkpoint: Checkpoint) -> str:
    """Write one checkpoint and return its folder.

    A local checkpoint is renamed into place when complete. On an object store the marker is uploaded last; failed
    uploads are retried.

    Raises:
        OSError: If the disk is full.
        MediaError: If the object store refuses an upload.
    """
    state = checkpoint.state
    target = checkpoint_uri(output, state.step)
    local = storage.is_local(target)
    parent = Path(storage.local_path(target)).parent if local else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
    try:
        save_bridge(folder, checkpoint.info, checkpoint.weights, checkpoint.tokenizer)
        torch.save({entry.name: getattr(state, entry.name) for entry in fields(state)}, folder / TRAINING_FILE)
        (folder / SETTINGS_FILE).write_text(checkpoint.settings_yaml)
        write_marker(folder, {"format_version": FORMAT_VERSION, "step": state.step})
        if local:
            _replace_folder(folder, Path(storage.local_path(target)))
        else:
            _upload(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def remove_unfinished(output: str) -> None:
    """Remove the unfinished checkpoints of killed writers from a local run folder."""
    folder = Path(storage.local_path(storage.join(output, CHECKPOINTS_FOLDER))) if storage.is_local(output) else None
    for unfinished in folder.glob(f"{_UNFINISHED}*") if folder is not None else ():
        shutil.rmtree(unfinished, ignore_errors=True)


def load_checkpoint(
    folder: Path, trainables: nn.Module, *, expected: BridgeInfo, order: str, frozen: Mapping[str, str]
) -> TrainingState:
    """Load trainables in place and return the rest.

    Args:
        folder: Folder of a complete checkpoint.
        trainables: Module whose weights are replaced.
        expected: Model that the settings describe.
        order: Fingerprint of the order of samples that the settings give.
        frozen: SHA-256 of the backbones' weights, by name.

    Raises:
        UserError: If the checkpoint has another model, other backbones or another order of samples.
    """
    info = read_info(folder)
    if info.stage != expected.stage:
        raise UserError(f"resume: {str(folder)!r} is of stage {info.stage}, the settings say stage={expected.stage}")
    for name in _MODEL_FIELDS:
        saved, wanted = _comparable(info, name), _comparable(expected, name)
        if saved != wanted and name != "qformer":  # `load_weights` checks its shapes
            raise UserError(
                f"resume: {name} is {saved!r} in {str(folder)!r} and {wanted!r} in the settings; restore it"
            )
    load_weights(trainables, folder)
    values = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
    if values["order"] != order:
        raise UserError(
            f"resume: manifest, split, seed or batch_size differ from those of {str(folder)!r}, so the position in the "
            "data is lost; restore them, or start a new run (with init_from) in another output"
        )
    state = TrainingState(**values)
    for name, digest in state.frozen.items():
        if frozen.get(name, digest) != digest:
            raise UserError(
                f"resume: the {name} model has other weights than the one of {str(folder)!r}; give model.{name} and "
                "precision as they were, or start a new run with init_from"
            )
    return state


def _comparable(info: BridgeInfo, name: str) -> Any:
    """A field's value; of a backbone without its name, which changes with its folder (its weights identify it)."""
    value = getattr(info, name)
    if name not in _BACKBONES or value is None:
        return value
    return {part: found for part, found in asdict(value).items() if part != "name"}


def _replace_folder(source: Path, target: Path) -> None:
    """Rename into place; replaces an older checkpoint of a step that was done again after a crash."""
    if target.exists():
        shutil.rmtree(target)
    os.chmod(source, 0o755)  # mkdtemp makes folders private; a run is shared like any other output
    source.rename(target)


def _upload(folder: Path, target: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(target)
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    for name in sorted(names, key=lambda name: name == COMPLETE_MARKER):
        filesystem.makedirs(f"{path}/{name}".rsplit("/", 1)[0], exist_ok=True)
        with_retries(target, lambda name=name: filesystem.put_file(str(folder / name), f"{path}/{name}"))  # type: ignore[misc]
