"""Checkpoints on any filesystem: written aside, then complete at once or not at all.

RUN/checkpoints/step-00000500/
    bridge.json, bridge.safetensors, tokenizer/   the model (`qformer.bridge`)
    training.pt                                   optimizer, accounting, quarantine
    settings.yaml                                 resolved settings of the run
    complete.json                                 written last: format version, step, file sizes
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import nn

from pipelines.data import storage
from qformer.bridge import FORMAT_VERSION, BridgeInfo, load_weights, read_info, save_bridge
from qformer.errors import UserError
from qformer.text import TextTokenizer

TRAINING_FILE, SETTINGS_FILE = "training.pt", "settings.yaml"


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


def checkpoint_uri(output: str, step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return storage.join(output, storage.CHECKPOINTS_FOLDER, f"step-{step:08d}")


def save_checkpoint(
    output: str,
    *,
    info: BridgeInfo,
    trainables: nn.Module,
    tokenizer: TextTokenizer | None,
    state: TrainingState,
    settings_yaml: str,
) -> str:
    """Write one checkpoint and return its folder.

    A local checkpoint is renamed into place when whole. On an object store `complete.json` is uploaded last; a folder
    without it does not count.
    """
    target = checkpoint_uri(output, state.step)
    local = storage.is_local(target)
    parent = Path(storage.local_path(target)).parent if local else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    try:
        save_bridge(folder, info, trainables, tokenizer)
        values = {"optimizer": state.optimizer, "accounting": state.accounting, "order": state.order}
        torch.save({"step": state.step, **values}, folder / TRAINING_FILE)
        (folder / SETTINGS_FILE).write_text(settings_yaml)
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
        marker = {"format_version": FORMAT_VERSION, "step": state.step, "files": sizes}
        (folder / storage.COMPLETE_MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        if local:
            _replace_folder(folder, Path(storage.local_path(target)))
        else:
            _upload(folder, target, [*sizes, storage.COMPLETE_MARKER])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def load_checkpoint(folder: Path, trainables: nn.Module, *, expected: BridgeInfo, order: str) -> TrainingState:
    """Load trainables in place and return the rest.

    Raises:
        UserError: If the checkpoint is of another stage or shape, or the data or seed changed under the run.
    """
    info = read_info(folder)
    if info.stage != expected.stage:
        raise UserError(f"resume: {str(folder)!r} is of stage {info.stage}, the settings say stage={expected.stage}")
    load_weights(trainables, folder)
    values = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
    if values["order"] != order:
        raise UserError(
            f"resume: manifest, split, seed or batch_size differ from those of {str(folder)!r}, so the position in the "
            "data is lost; restore them, or start a new run (with init_from) in another output"
        )
    return TrainingState(values["step"], values["optimizer"], values["accounting"], values["order"])


def _replace_folder(source: Path, target: Path) -> None:
    """Rename into place; a step redone after a crash replaces its older twin."""
    if target.exists():
        shutil.rmtree(target)
    os.chmod(source, 0o755)  # mkdtemp makes folders private; a run is shared like any other output
    source.rename(target)


def _upload(folder: Path, target: str, names: list[str]) -> None:
    filesystem, path = fsspec.core.url_to_fs(target)
    for name in names:
        filesystem.makedirs(f"{path}/{name}".rsplit("/", 1)[0], exist_ok=True)
        filesystem.put_file(str(folder / name), f"{path}/{name}")
