"""Checkpoints on any filesystem: taken between two steps, written aside, then complete at once or not at all.

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
_MODEL_FIELDS = tuple(one.name for one in fields(BridgeInfo) if one.name not in ("step", "format_version"))


@dataclass(slots=True)
class TrainingState:
    """What resuming needs beside the trainables."""

    step: int
    """Optimizer steps done; the position in the data is a function of it."""
    optimizer: dict[str, Any]
    accounting: dict[str, Any]
    """`Accounting.state()` of the surviving trajectory."""
    order: str
    """Fingerprint of what decides the order of samples."""
    raw_weights: dict[str, Tensor] | None = None
    """Trainables as training left them, where the checkpoint's weights are their moving average."""
    log_variances: Tensor | None = None
    """Of the objective, where it learns its weights."""
    frozen: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the backbones' weights, by name; empty where an older version did not say."""
    workers: int = 0
    """Ranks that took the step; 0 where an older version did not say."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 loss scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A run as it stood between two steps; nothing in it changes when training goes on."""

    info: BridgeInfo
    weights: dict[str, Tensor]
    """Those to use: the trainables', or their moving average where there is one."""
    tokenizer: TextTokenizer | None
    state: TrainingState
    settings_yaml: str


def copied(value: Any) -> Any:
    """The same nest of dicts and lists with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(one) for one in value)
    return value


def write_checkpoint(output: str, checkpoint: Checkpoint) -> str:
    """Write one checkpoint and return its folder.

    A local checkpoint is renamed into place when whole. On an object store the marker is uploaded last, and an upload
    that fails for a while is tried again.

    Raises:
        OSError: If there is no room for it.
        MediaError: If the object store does not take it.
    """
    state = checkpoint.state
    target = checkpoint_uri(output, state.step)
    local = storage.is_local(target)
    parent = Path(storage.local_path(target)).parent if local else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
    try:
        save_bridge(folder, checkpoint.info, checkpoint.weights, checkpoint.tokenizer)
        torch.save({one.name: getattr(state, one.name) for one in fields(state)}, folder / TRAINING_FILE)
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
    """Remove what writers that were killed have left in a local run folder."""
    folder = Path(storage.local_path(storage.join(output, CHECKPOINTS_FOLDER))) if storage.is_local(output) else None
    for left in folder.glob(f"{_UNFINISHED}*") if folder is not None else ():
        shutil.rmtree(left, ignore_errors=True)


def load_checkpoint(
    folder: Path, trainables: nn.Module, *, expected: BridgeInfo, order: str, frozen: Mapping[str, str]
) -> TrainingState:
    """Load trainables in place and return the rest.

    Raises:
        UserError: If the checkpoint is of another model, or the data or seed changed under the run.
    """
    info = read_info(folder)
    if info.stage != expected.stage:
        raise UserError(f"resume: {str(folder)!r} is of stage {info.stage}, the settings say stage={expected.stage}")
    for name in _MODEL_FIELDS:
        theirs, ours = (_unnamed(one, name) for one in (info, expected))
        if theirs != ours and name != "qformer":  # whose shapes the weights tell
            raise UserError(f"resume: {name} is {theirs!r} in {str(folder)!r} and {ours!r} in the settings; restore it")
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


def _unnamed(info: BridgeInfo, field_name: str) -> Any:
    """Value of a field, without the name of a backbone: that may change with its place, and weights tell what it is."""
    value = getattr(info, field_name)
    is_named = field_name in _BACKBONES and value is not None
    return {key: one for key, one in asdict(value).items() if key != "name"} if is_named else value


def _replace_folder(source: Path, target: Path) -> None:
    """Rename into place; a step redone after a crash replaces its older twin."""
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
