"""The fenced blocks of README and docs, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

_OPEN = re.compile(r"^```(\w*)(?:\s+title=\"([^\"]+)\")?\s*$")


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command of a shell block, without comments."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() for part in line.split(" && ") if (words := _words(part))]


def _words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def pages() -> list[Path]:
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(page)]


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    name, start = page.relative_to(REPOSITORY).as_posix(), None
    for number, line in enumerate(lines, 1):
        if start is None and line.lstrip().startswith("```"):
            match = _OPEN.match(line)
            assert match, f'{name}:{number}: write a fence as ```LANGUAGE or ```LANGUAGE title="FILE", not {line!r}'
            start = number
        elif start is not None and line == "```":
            yield Block(name, start, match[1], match[2] or "", "\n".join(lines[start : number - 1]) + "\n")
            start = None
    assert start is None, f"{name}:{start}: the fence is not closed"


def blocks_in(language: str) -> list[Block]:
    """Blocks of one language; those of the page on bridges are applied by a test of their own."""
    return [block for block in all_blocks() if block.language == language and not is_applied_elsewhere(block)]


def is_applied_elsewhere(block: Block) -> bool:
    return block.page == "docs/add-a-bridge.md" and block.language not in ("sh", "json")
