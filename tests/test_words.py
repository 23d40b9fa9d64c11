"""Names and prose use the field's terms: no metaphor, no personified code, argument docs that stand alone."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from .source_tree import PACKAGES, REPOSITORY, parse

# Words that no name has as a part of its own (`song_length`, `SongLength`; `TensorBoard` is two words, and allowed).
NAME_WORDS = {
    *("desk", "board", "ear", "ears", "song", "songs", "sing", "sings", "sang", "sung"),
    *("told", "tell", "tells", "heard", "hear", "hears", "seen", "kept", "whoever", "lest", "beside"),
}
# Words that no comment, docstring, message or page has.
PROSE_WORDS = {
    *("desk", "board", "ear", "ears", "song", "songs", "sing", "sings", "sang", "sung"),
    *("told", "tells", "heard", "hears", "whoever", "lest", "likewise"),
}
# What contains one of these words and means what it says.
HONEST = re.compile(
    r"Tensor[ _]?Board|dash-?board|on-?board|key-?board|clip-?board|white-?board|song titles?",
    re.IGNORECASE,
)
# (file, name) of names that a file format, another library or a saved run fixes.
FIXED_NAMES = {
    # Methods of files, by the io protocol.
    ("pipelines/data/corpus/sources/files.py", "tell"),
    ("pipelines/data/order/row_index.py", "tell"),
}
# An argument's or a field's doc is a noun phrase that stands alone.
DEPENDENT = re.compile(r"(Of|As|Likewise|See above|Ditto)\b[ ,.]")
# Sections of a docstring whose entries are `name: doc`.
ENTRY = re.compile(r"^ {4,}(\w+): (.*)$")

# The page of rules shows the words that it forbids.
RULES_PAGES = ("docs/style.md", "docs/contributing/style.md")
PAGES = ("README.md", "CONTRIBUTING.md", "Makefile", "docs/**/*.md", *(f"{name}/**/*.yaml" for name in PACKAGES))


def parts(name: str) -> list[str]:
    """Words of a name: "num_toldRows" is num, told, rows."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that the code defines: modules' names come from their paths."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str() as name):
                yield node.lineno, name


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of comments and of strings, docstrings included."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1):
            for number, line in enumerate(token.string.splitlines()):
                yield token.start[0] + number, line


def docs(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of the beginning of every docstring, of every field's doc, and of every entry of a section."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                continue
            if not isinstance(child.value.value, str):
                continue
            lines = child.value.value.splitlines()
            yield child.lineno, lines[0] if lines else ""
            section = ""
            for number, line in enumerate(lines):
                if re.fullmatch(r" *(Args|Attributes|Raises|Returns|Yields):", line):
                    section = line.strip()
                elif section and (entry := ENTRY.match(line)):
                    yield child.lineno + number, entry[2]
                elif section in ("Returns:", "Yields:") and line.strip():
                    yield child.lineno + number, line.strip()
                    section = ""


def prose_words(line: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", HONEST.sub("", line).lower()) if word in PROSE_WORDS]


def complaints(path: str, text: str) -> list[str]:
    """What is wrong in a file of the product or the docs, one line each."""
    if not path.endswith(".py"):
        return [
            f"{path}:{number}: {word}" for number, line in enumerate(text.splitlines(), 1) for word in prose_words(line)
        ]
    tree = parse(text)
    found = [(0, f"module name: {word}") for word in parts(Path(path).stem) if word in NAME_WORDS]
    found += [
        (line, f"name {name}")
        for line, name in names(tree)
        if NAME_WORDS.intersection(parts(HONEST.sub("", name))) and (path, name) not in FIXED_NAMES
    ]
    found += [(number, word) for number, line in prose(text) for word in prose_words(line)]
    found += [(line, f"doc begins {doc[:30]!r}") for line, doc in docs(tree) if DEPENDENT.match(doc)]
    return [f"{path}:{line}: {problem}" for line, problem in sorted(set(found))]


def files() -> list[str]:
    found = {path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")}
    found |= {path for pattern in PAGES for path in REPOSITORY.glob(pattern)}
    return sorted({path.relative_to(REPOSITORY).as_posix() for path in found} - set(RULES_PAGES))


def test_no_old_metaphors():
    assert [said for path in files() for said in complaints(path, (REPOSITORY / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("jobs/desk.py", ""),
        ("jobs/planted.py", "rows_seen = 1"),
        ("jobs/planted.py", "class RunDesk: ..."),
        ("jobs/planted.py", "def f(told): ..."),
        ("jobs/planted.py", "self.kept = 1"),
        ("jobs/planted.py", "# The worker tells the driver."),
        ("jobs/planted.py", 'raise ValueError(f"{name} is heard nowhere")'),
        ("jobs/planted.py", 'def f(a):\n    """Do.\n\n    Args:\n        a: Of the clip.\n    """'),
        ("jobs/planted.py", 'def f():\n    """Do.\n\n    Returns:\n        As above.\n    """'),
        ("jobs/planted.py", 'class A:\n    b: int\n    """As the model has it."""'),
        ("docs/planted.md", "Whoever reads this"),
    ],
)
def test_the_search_notices(path, text):
    assert len(complaints(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("jobs/planted.py", "tensor_board = TensorBoardWriter()\n# TensorBoard, a dashboard and an on-board chip"),
        ("jobs/planted.py", 'unseen_token = 1\n"""Images seen in training are kept."""'),
        ("jobs/planted.py", 'def f(a):\n    """Do.\n\n    Args:\n        a: Office of the clip.\n    """'),
        ("docs/planted.md", "The dashboard shows single tokens that the clipboard holds."),
    ],
)
def test_the_search_allows(path, text):
    assert complaints(path, text) == []
