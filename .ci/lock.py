"""Write the locks: every package of pyproject.toml at one version, with the hashes of its wheels.

Run `python .ci/lock.py` to take the newest versions, `python .ci/lock.py --keep` to keep the locked ones where they
still fit. requirements.lock is what pip's own configuration resolves to, with the CPU build of torch; in
requirements-cuda.lock torch is the default index's build, with the CUDA libraries that it needs. Wheels of Linux on
x86_64 are listed, for each Python of `PYTHONS`. No index is named.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
LOCK = REPOSITORY / "requirements.lock"
CUDA_LOCK = REPOSITORY / "requirements-cuda.lock"
HEADER = "# Exact versions with hashes of Linux wheels on x86_64, {torch}. Written by .ci/lock.py; do not edit.\n"
PYTHONS = ("3.11", "3.12")
GLIBC_MINORS = range(39, 4, -1)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS] + [
    f"{tag}_x86_64" for tag in ("manylinux2014", "manylinux2010", "manylinux1", "linux")
]


def main() -> int:
    """Resolve for this interpreter, then collect the same versions' wheels for every Python, once a lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep locked versions where they still fit")
    constraints = re.findall(r"^[\w.-]+==\S+", LOCK.read_text(), re.MULTILINE) if parser.parse_args().keep else []
    _write(LOCK, "with the CPU build of torch", _resolve(constraints, default_index=False), default_index=False)
    # The same versions once more: only what torch brings along differs.
    constraints = re.findall(r"^[\w.-]+==\S+", LOCK.read_text(), re.MULTILINE)
    _write(CUDA_LOCK, "with CUDA for torch", _resolve(constraints, default_index=True), default_index=True)
    return 0


def _resolve(constraints: list[str], *, default_index: bool) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        return _report(["--constraint", file.name, *_requirements()], default_index=default_index)


def _write(lock: Path, torch: str, resolved: list[dict[str, Any]], *, default_index: bool) -> None:
    pins = {_name(item): _version(item) for item in resolved}
    hashes: dict[str, set[str]] = defaultdict(set)
    for python in PYTHONS:
        for item in resolved + _wheels(pins, python, default_index=default_index):
            # With a labelled wheel (+cpu) listed, an unlabelled one must not be: pip would prefer the index's.
            if _name(item) not in _labelled(resolved) or "+" in item["metadata"]["version"]:
                hashes[_name(item)].add(item["download_info"]["archive_info"]["hashes"]["sha256"])
    lock.write_text(
        HEADER.format(torch=torch) + "".join(_entry(name, pins[name], hashes[name]) for name in sorted(pins))
    )


def _labelled(items: list[dict[str, Any]]) -> set[str]:
    return {_name(item) for item in items if "+" in item["metadata"]["version"]}


def _requirements() -> list[str]:
    """What the build, the program and its checks need, as pyproject.toml lists it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    listed: list[str] = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    listed += project["project"]["optional-dependencies"]["dev"]
    return listed


def _wheels(pins: dict[str, str], python: str, *, default_index: bool) -> list[dict[str, Any]]:
    tags = [word for tag in PLATFORMS for word in ("--platform", tag)]
    names = [f"{name}=={version}" for name, version in pins.items()]
    with tempfile.TemporaryDirectory() as folder:
        target = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "--target", folder]
        return _report([*target, *tags, *names], default_index=default_index)


def _report(words: list[str], *, default_index: bool) -> list[dict[str, Any]]:
    """What pip would install, one mapping a package."""
    environment = dict(os.environ)
    if default_index:
        environment["PIP_CONFIG_FILE"] = os.devnull
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
            environment.pop(name, None)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--report", "-", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: pip failed:\n{done.stderr}")
    items: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return items


def _name(item: dict[str, Any]) -> str:
    return re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()


def _version(item: dict[str, Any]) -> str:
    """Without a local label such as +cpu: `==2.13.0` matches labelled wheels too."""
    return str(item["metadata"]["version"]).partition("+")[0]


def _entry(name: str, version: str, hashes: set[str]) -> str:
    return " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{one}" for one in sorted(hashes))]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
