"""Steps that are done once: a step runs again only when its settings, its inputs or the code changed."""

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
        output: Folder of the demo; one of its own, or a new one.

    Raises:
        UserError: If the folder holds something else.
    """

    output: Path
    _keys: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    has_rerun: bool = False
    """Whether any step had to run in this process."""

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
        """Run `work` unless it ran before with the same inputs.

        Args:
            name: Of the step and its folder, which is emptied before.
            inputs: JSON-ready values that decide the result.
            work: Does the step.
            after: Steps whose results it uses.
        """
        key = self._key(name, inputs, after)
        if self._keys.get(name) == key:
            logger.info("%s: unchanged, reused", name)
            return
        self.delete(name)
        logger.info("%s …", name)
        begun = time.perf_counter()
        work()
        self.has_rerun = True
        self._keys[name], self._seconds[name] = key, time.perf_counter() - begun
        logger.info("%s: done in %.0f s", name, self._seconds[name])
        self._save()

    def is_done(self, name: str) -> bool:
        """Whether the step ran before; `run` may still find that its inputs changed."""
        return name in self._keys

    def delete(self, *names: str) -> None:
        """Delete steps, so that they run again."""
        for name in names:
            self._keys.pop(name, None)
            shutil.rmtree(self.folder(name), ignore_errors=True)
        self._save()

    @property
    def seconds(self) -> dict[str, float]:
        """How long each step took when it ran."""
        return dict(self._seconds)

    def _key(self, name: str, inputs: Any, after: tuple[str, ...]) -> str:
        upstream = [self._keys.get(step, "") for step in after]
        return hashlib.sha256(json.dumps([name, inputs, upstream, _code_digest()], sort_keys=True).encode()).hexdigest()

    def _save(self) -> None:
        (self.output / STATE_FILE).write_text(json.dumps({"keys": self._keys, "seconds": self._seconds}, indent=2))


def _code_digest() -> str:
    """Digest of the project's own sources and shipped models: when they change, every step runs again."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    files = [file for folder in CODE_FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    for file in [*files, *sorted(file for file in (root / MODELS_FOLDER).rglob("*") if file.is_file())]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
