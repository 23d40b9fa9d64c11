"""Cached steps: a step runs again only if its settings, its inputs or the code have changed."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer.errors import UserError

STATE_FILE = "demo.json"
CODE_FOLDERS = ("qformer", "pipelines", "jobs")
MODELS_FOLDER = "jobs/demo/models"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Steps:
    """The demo's steps in one output folder.

    Args:
        output: Folder of the demo, from an earlier run or new.

    Raises:
        UserError: If the folder holds other files.
    """

    output: Path
    _keys: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    has_rerun: bool = False
    """Whether any step ran in this process."""

    def __post_init__(self) -> None:
        state = self.output / STATE_FILE
        if state.is_file():
            values = json.loads(state.read_text())
            self._keys, self._seconds = values["keys"], values["seconds"]
        elif self.output.exists() and any(self.output.iterdir()):
            raise UserError(f"demo.output={self.output} holds something else; choose another folder")
        self.output.mkdir(parents=True, exist_ok=True)

    def folder(self, name: str) -> Path:
        """Folder of a step's files."""
        return self.output / name

    def run(self, name: str, inputs: Any, work: Callable[[], Any], *, after: tuple[str, ...] = ()) -> None:
        """Run a step unless it ran before with the same inputs.

        Args:
            name: Name of the step and of its folder, which is deleted first.
            inputs: JSON-ready values that decide the result.
            work: Function that does the step.
            after: Names of the steps whose results it uses.
        """
        key = self._key(name, inputs, after)
        if self._keys.get(name) == key:
            logger.info("%s: unchanged, reused", name)
            return
        self.delete(name)
        logger.info("%s …", name)
        start_s = time.perf_counter()
        work()
        self.has_rerun = True
        self._keys[name], self._seconds[name] = key, time.perf_counter() - start_s
        logger.info("%s: done in %.0f s", name, self._seconds[name])
        self._save()

    def is_done(self, name: str) -> bool:
        """Whether the step ran before; `run` may still repeat it if its inputs have changed."""
        return name in self._keys

    def delete(self, *names: str) -> None:
        """Delete steps, so that they run again."""
        for name in names:
            self._keys.pop(name, None)
            shutil.rmtree(self.folder(name), ignore_errors=True)
        self._save()

    @property
    def seconds(self) -> dict[str, float]:
        """Duration of each step when it last ran."""
        return dict(self._seconds)

    def _key(self, name: str, inputs: Any, after: tuple[str, ...]) -> str:
        upstream = [self._keys.get(step, "") for step in after]
        return hashlib.sha256(json.dumps([name, inputs, upstream, _code_digest()], sort_keys=True).encode()).hexdigest()

    def _save(self) -> None:
        (self.output / STATE_FILE).write_text(json.dumps({"keys": self._keys, "seconds": self._seconds}, indent=2))


def _code_digest() -> str:
    """Digest of the project's sources and shipped models; a change makes every step run again."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    files = [file for folder in CODE_FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    for file in [*files, *sorted(file for file in (root / MODELS_FOLDER).rglob("*") if file.is_file())]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
