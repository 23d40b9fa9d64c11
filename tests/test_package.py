"""The wheel and the sdist: built offline from a copy, installed into an empty folder, and used from there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from .source_tree import PACKAGES, REPOSITORY, sources

# Files that only a clone has: figures of past benchmarks, and what a cluster's operator edits.
CLONE_ONLY = ("jobs/bench/results/", "cluster/")

# Run with -S, so that no .pth file of the environment is read: an editable install of the clone cannot serve a module.
IMPORT_ALL = """
import importlib, sys
from pathlib import Path
folder = Path(sys.argv[1])
for name in sys.stdin.read().split():
    try:
        file = importlib.import_module(name).__file__
    except ImportError as error:
        print(f"{name}: {error}")
        continue
    if not Path(file).is_relative_to(folder):
        print(f"{name}: imported from {file}")
"""

# One process builds the wheel that all tests here share.
pytestmark = pytest.mark.xdist_group("package")


def names():
    """Every module of the product, from the clone."""
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources()]


def copied(folder):
    """The files that a build reads, without build folders or metadata that an earlier build left in the clone."""
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def call(*words, cwd, **options):
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words, cwd):
    return call(sys.executable, "-m", "pip", "--disable-pip-version-check", *words, cwd=cwd)


def built_wheel(source, folder):
    folder.mkdir()
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel, folder):
    pip("install", "--no-index", "--no-deps", "--no-compile", "--target", folder, wheel, cwd=folder.parent)
    return folder


def environment(folder):
    """Finds `folder` first, then the packages that this interpreter has, and never the clone."""
    paths = [folder, *dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def missing_modules(folder, elsewhere, wanted):
    """What cannot be imported from `folder`, one line each; dependencies come from the running environment."""
    command = [sys.executable, "-S", "-P", "-W", "ignore", "-c", IMPORT_ALL, folder]
    return call(*command, cwd=elsewhere, env=environment(folder), input="\n".join(wanted)).splitlines()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def wheel(room):
    return built_wheel(copied(room / "source"), room / "wheels")


@pytest.fixture(scope="module")
def place(room, wheel):
    """The wheel, installed without its dependencies into an empty folder."""
    return installed(wheel, room / "place")


def test_every_module_imports_from_the_installed_wheel(place, tmp_path):
    assert missing_modules(place, tmp_path, names()) == []


def test_the_import_notices_a_package_that_is_left_out(tmp_path):
    source = copied(tmp_path / "source")
    project = source / "pyproject.toml"
    found = '"cluster*"]'
    assert found in project.read_text()
    project.write_text(project.read_text().replace(found, f'{found}\nexclude = ["qformer.torch_build*"]'))
    place = installed(built_wheel(source, tmp_path / "wheels"), tmp_path / "place")
    said = missing_modules(place, tmp_path, ["qformer.errors", "qformer.torch_build.vector_math"])
    assert [line.partition(":")[0] for line in said] == ["qformer.torch_build.vector_math"]


def test_configs_console_and_demo_models_are_in_the_wheel(wheel):
    inside = {name for name in contents(wheel) if ".dist-info/" not in name}
    there = {
        path.relative_to(REPOSITORY).as_posix()
        for name in PACKAGES
        for path in (REPOSITORY / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in there if name.endswith(".py") or not name.startswith(CLONE_ONLY)}
    assert inside == shipped
    for example in ("jobs/configs/recipes/toy.yaml", "pipelines/serving/console/index.html"):
        assert example in inside
    assert any(name.startswith("jobs/demo/models/") for name in inside)


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", code, tmp_path, cwd=copied(tmp_path / "source"))
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = built_wheel(unpacked, tmp_path / "wheels")
    assert again.name == wheel.name
    ours, theirs = (
        {name: archive.read(name) for name in archive.namelist()} for archive in map(zipfile.ZipFile, (wheel, again))
    )
    assert ours == theirs


def test_the_version_stands_in_one_place(wheel):
    (version,) = re.findall(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert wheel.name.split("-")[:2] == ["qformer", version]
    assert f"\n## [{version}]" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], "jobs:"),
        (["train", "--config", "recipes/blip2_stage1.yaml", "--show-config"], "learning_rate"),
        (["demo", "--show-config"], "output: demo-out"),
    ],
)
def test_the_command_works_outside_a_clone(place, tmp_path, words, expected):
    command = [sys.executable, "-S", place / "bin" / "qformer", *words]
    assert expected in call(*command, cwd=tmp_path, env=environment(place))
    assert list(tmp_path.iterdir()) == []
