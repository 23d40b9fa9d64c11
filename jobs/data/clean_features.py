"""`qformer features --clean`: remove feature caches that no run's settings name."""

from typing import Any

import yaml
from pydantic import Field

from jobs.folders.output import SETTINGS_FILE
from jobs.settings.data import Settings
from pipelines.data import storage
from pipelines.data.batches.stage_report import format_bytes
from pipelines.data.features.cleaning import find_caches, remove_cache
from qformer.errors import UserError

_MAX_SETTINGS_BYTES = 2**20


class CleanFeaturesSettings(Settings):
    """`qformer features --clean`: remove feature caches that no run refers to."""

    caches: str
    """Folder that is searched for caches, including all folders below it."""
    runs: list[str] = Field(min_length=1)
    """Folders of all your runs: a cache that a settings.yaml below them names as data.features is used."""
    min_age_h: float = Field(default=24.0, ge=0)
    """Caches changed more recently are used: a later run may use them."""
    confirm: bool = False
    """false only lists what would be removed."""


def main(settings: CleanFeaturesSettings) -> dict[str, Any]:
    """Print for every cache whether it stays and why; with `confirm`, remove the others.

    Returns:
        "removed" (or, without `confirm`, "removable") and "kept": lists of folders.

    Raises:
        UserError: If a folder does not exist, or a run's settings cannot be read: they may name a cache.
    """
    referred = [name for folder in settings.runs for name in _referred_caches(folder)]
    used, unused = [], []
    for cache in find_caches(settings.caches, referred, settings.min_age_h):
        line = f"{cache.folder}: {format_bytes(cache.size_bytes)}, of {cache.vision}"
        if cache.keep_reason is not None:
            used.append(cache.folder)
            print(f"keep    {line}; {cache.keep_reason}")
            continue
        unused.append(cache.folder)
        if settings.confirm:
            remove_cache(cache)
            print(f"removed {line}")
        else:
            print(f"unused  {line}; no run below {', '.join(settings.runs)} refers to it")
    if unused and not settings.confirm:
        print("nothing was removed; add --set confirm=true to remove what is unused")
    return {"removed" if settings.confirm else "removable": unused, "kept": used}


def _referred_caches(folder: str) -> list[str]:
    """Caches of the runs in a folder and below."""
    if not storage.is_folder(folder):
        raise UserError(f"runs={folder} is not a folder; give the folders of your runs")
    names = []
    for path in storage.list_files(folder):
        if path.rpartition("/")[2] != SETTINGS_FILE:
            continue
        uri = storage.join(folder, path)
        try:
            values = yaml.safe_load(storage.read_bytes(uri, _MAX_SETTINGS_BYTES))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{uri} cannot be read ({reason}) and may name a cache; fix or remove it first") from error
        data = values.get("data") if isinstance(values, dict) else None
        found = data.get("features") if isinstance(data, dict) else None
        if isinstance(found, str):
            names.append(found)
    return names
