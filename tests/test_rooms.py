"""Rooms: inside a package imports point downwards only, no cycle, and no folder grows past a dozen modules."""

import ast
from collections import Counter

import pytest

from .source_tree import Module, cycles, import_graph, modules, parse

MAX_MODULES = 12
# Catalogues of alike siblings may hold more. `configs` holds no modules.
CATALOGUES = ("qformer/bridges", "pipelines/evaluation/protocols", "pipelines/data/corpus/sources", "jobs/bench")

# Package -> its rooms, lowest first. A room is a folder or a module; "*" stands for all modules that are not named.
# In qformer the single modules follow the code, and `adapters`, `audio` and `torch_build` stand below the bridges that
# use them.
ROOMS = {
    "qformer": (
        *("errors", "config", "masks", "torch_build", "distributed", "attention", "layers", "model", "queries"),
        *("text", "language", "preprocessing", "adapters", "backbones", "audio"),
        *("bridges", "objectives", "generation", "conversion", "analysis"),
    ),
    "qformer.generation": ("requests", "passes", "*"),
    "pipelines": ("data", "inference", "training", "evaluation", "serving"),
    "pipelines.data": (
        *("schema", "names", "failures", "storage", "media", "corpus", "order", "batches", "features", "dataset"),
    ),
    "pipelines.training": ("records", "step", "run", "group"),
    "pipelines.evaluation": ("metrics", "protocols", "analysis", "report", "doctor"),
    "pipelines.serving": ("contract", "workers", "http", "app"),
    "jobs": (
        *("settings", "cluster", "folders", "data", "train", "evaluate", "convert", "serve", "doctor", "demo", "bench"),
        "cli",
    ),
}
# Doors stand above all rooms of their package and nothing of the product imports them.
ALIASES = {"jobs.serve_config", "pipelines.serving.body_ahead"}


def is_launcher(module: Module) -> bool:
    """Whether the file holds only imports and `if __name__ == "__main__": sys.exit(run_job(NAME))`."""
    *imports, last = parse(module.text).body[1:] or [ast.Pass()]
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in imports) and ast.unparse(last).startswith(
        "if __name__ == '__main__':\n    sys.exit(run_job("
    )


def is_door(module: Module) -> bool:
    return module.name in ALIASES or module.path.name == "__main__.py" or is_launcher(module)


def room_of(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.").partition(".")[0]


def order_violations(package: str, found: dict[str, Module]) -> list[str]:
    """Upward imports inside `package` and rooms that its order does not name, one sentence each."""
    ranks = {room: rank for rank, room in enumerate(ROOMS[package])}
    said = []
    for name, imported in sorted(import_graph(found).items()):
        if not name.startswith(f"{package}.") or is_door(found[name]):
            continue
        room = room_of(name, package)
        rank = ranks.get(room, ranks.get("*"))
        if rank is None:
            said.append(f"{found[name].path}: {room} is no room of {package}; give it a place in ROOMS")
            continue
        for other in sorted(imported):
            if not other.startswith(f"{package}."):
                continue
            other_room = room_of(other, package)
            if is_door(found[other]):
                said.append(f"{name} imports {other}, a door")
            elif ranks.get(other_room, ranks.get("*", -1)) > rank:
                said.append(f"{name} imports {other}, but {other_room} stands above {room}")
    return said


def room_cycles(found: dict[str, Module]) -> list[list[str]]:
    """Cycles among the rooms of every package, `ROOMS` or not, and among the modules of every folder."""
    graph = import_graph(found)
    packages = {module.package for module in found.values()}
    said = []
    for package in sorted(packages):
        inside: dict[str, set[str]] = {}
        for name, imported in graph.items():
            if not name.startswith(f"{package}.") or is_door(found[name]):
                continue
            others = {f"{package}.{room_of(other, package)}" for other in imported if other.startswith(f"{package}.")}
            room = f"{package}.{room_of(name, package)}"
            inside.setdefault(room, set()).update(others - {room})
        said += cycles(inside)
    return said


def crowded(found: dict[str, Module]) -> dict[str, int]:
    """Folders with too many modules; `__init__` and doors are not counted."""
    counts = Counter(
        module.path.parent.as_posix()
        for module in found.values()
        if module.path.name != "__init__.py" and not is_door(module)
    )
    return {folder: count for folder, count in counts.items() if count > MAX_MODULES and folder not in CATALOGUES}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downwards_only(package):
    assert order_violations(package, modules()) == []


def test_no_cycle_among_modules():
    assert cycles(import_graph(modules())) == []


def test_no_cycle_among_rooms():
    assert room_cycles(modules()) == []


def test_no_folder_is_crowded():
    assert crowded(modules()) == {}


@pytest.mark.parametrize(
    ("package", "path", "text"),
    [
        # upwards, at the top
        ("pipelines.data", "pipelines/data/storage/planted.py", "from pipelines.data.features import cache"),
        # upwards, inside a function
        ("qformer", "qformer/masks.py", "def late():\n    from qformer.bridges import config"),
        ("qformer.generation", "qformer/generation/requests/planted.py", "from qformer.generation import engine"),
        # relative
        ("pipelines.training", "pipelines/training/step/planted.py", "from ..group import launch"),
        # a room that nobody gave a place
        ("jobs", "jobs/planted/thing.py", "VALUE = 1"),
        # a door is for people, not for modules
        ("jobs", "jobs/train/planted.py", "from jobs.caption import run_job"),
    ],
)
def test_the_order_notices(package, path, text):
    found = modules({path: text})
    assert len(set(order_violations(package, found)) - set(order_violations(package, modules()))) == 1


def test_the_cycle_tests_notice():
    found = modules(
        {
            "pipelines/data/media/video/planted.py": "from pipelines.data.media import planted",
            "pipelines/data/media/planted.py": "def late():\n    from pipelines.data.media.video import planted",
        }
    )
    pair = ["pipelines.data.media.planted", "pipelines.data.media.video.planted"]
    assert pair in cycles(import_graph(found))
    # Two folders whose modules hold no cycle, but which need each other.
    found = modules(
        {
            "pipelines/data/media/video/planted.py": "from pipelines.data.storage import files",
            "pipelines/data/storage/planted.py": "from pipelines.data.media import facts",
        }
    )
    assert any({"pipelines.data.media", "pipelines.data.storage"} <= set(group) for group in room_cycles(found))
    assert cycles(import_graph(found)) == cycles(import_graph(modules()))


def test_the_count_notices():
    planted = {f"pipelines/training/run/planted_{number}.py": "VALUE = 1" for number in range(13)}
    assert "pipelines/training/run" in crowded(modules(planted))
    launcher = (
        'import sys\n\nfrom jobs.cli.main import run_job\n\nif __name__ == "__main__":\n    sys.exit(run_job("x"))\n'
    )
    launchers = {f"jobs/planted_{number}.py": f'"""One."""\n\n{launcher}' for number in range(13)}
    assert "jobs" not in crowded(modules(launchers))
