"""The product's modules and who imports whom, read off the syntax trees; nothing is imported."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("qformer", "pipelines", "jobs", "cluster")


@dataclass(frozen=True)
class Module:
    """One file: `path` is relative to the repository, `name` is the import path (a package's own for its __init__)."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        return ".".join(self.path.parts[:-1])


def sources() -> list[Path]:
    """Every module's file, relative to the repository."""
    return [path.relative_to(REPOSITORY) for name in PACKAGES for path in sorted((REPOSITORY / name).rglob("*.py"))]


@cache
def _texts() -> dict[Path, str]:
    return {path: (REPOSITORY / path).read_text() for path in sources()}


def modules(planted: Mapping[str, str] | None = None) -> dict[str, Module]:
    """Every module by name.

    Args:
        planted: Text to put in place of a file's own (or of a file that does not exist), by its path.
    """
    texts = {**_texts(), **{Path(path): text for path, text in (planted or {}).items()}}
    found = [Module(path, text) for path, text in texts.items()]
    return {module.name: module for module in found}


@cache
def parse(text: str) -> ast.Module:
    """The syntax tree of a module's text."""
    return ast.parse(text)


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """(module, is at top level) of every import; relative ones resolved against `package`.

    `from a import b` gives "a.b": whether b is a module or a name makes no difference to the rule.
    """
    waiting: list[tuple[ast.AST, bool]] = [(tree, True)]
    while waiting:
        node, is_top = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", is_top) for alias in node.names)
        elif not isinstance(node, ast.expr):
            is_top = is_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            waiting.extend((inner, is_top) for inner in ast.iter_child_nodes(node))


@cache
def imported_names(text: str, package: str) -> frozenset[str]:
    """What a module of `package` imports anywhere."""
    return frozenset(name for name, _ in imports(parse(text), package))


def import_graph(found: Mapping[str, Module]) -> dict[str, set[str]]:
    """The project's own modules that each module imports, inside functions or not."""
    graph: dict[str, set[str]] = {}
    for name, module in found.items():
        graph[name] = set()
        for imported in imported_names(module.text, module.package):
            while imported and imported not in found:
                imported = imported.rpartition(".")[0]
            if imported and imported != name:
                graph[name].add(imported)
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two and more that reach one another, each in alphabetical order."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        found, waiting = set(), [start]
        while waiting:
            for following in graph.get(waiting.pop(), ()):
                if following not in found:
                    found.add(following)
                    waiting.append(following)
        reachable[start] = found
    groups = {
        tuple(sorted({other for other in reachable[name] if name in reachable.get(other, ())}))
        for name in graph
        if name in reachable[name]
    }
    return sorted(map(list, groups))
