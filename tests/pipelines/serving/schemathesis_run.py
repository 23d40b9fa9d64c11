"""Requests that Schemathesis makes of the OpenAPI page, each wrong in some way. It has an environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def schemathesis_program(folder: Path) -> str:
    """That of QFORMER_TEST_SCHEMATHESIS, or one installed below `folder`; skips where neither can be."""
    if named := os.environ.get("QFORMER_TEST_SCHEMATHESIS"):
        return named
    environment = folder / "schemathesis"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [environment / "bin/pip", "install", "--quiet", "schemathesis>=4"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"schemathesis cannot be installed, and QFORMER_TEST_SCHEMATHESIS names none: {done.stderr[-200:]}")
    return str(environment / "bin/schemathesis")


def wrong_requests(program: str, url: str, folder: Path, max_examples: int) -> list[tuple[str, int]]:
    """Send generated requests that break the schema; returns method with path, and status, of each.

    Args:
        program: See `schemathesis_program`.
        url: Of the server; it must publish /openapi.json.
        folder: For the report.
        max_examples: Of each endpoint, at least.
    """
    report = folder / "report.har"
    command = [program, "run", f"{url}/openapi.json", "--mode", "negative", "--phases", "coverage,fuzzing"]
    command += ["--max-examples", str(max_examples), "--checks", "not_a_server_error", "--continue-on-failure"]
    command += ["--seed", "1", "--no-color", "--report", "har", "--report-har-path", str(report)]
    command += ["--suppress-health-check", "all"]
    # These take nothing that could be wrong.
    command += [word for path in ("/healthz", "/readyz", "/v1/models") for word in ("--exclude-path", path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert report.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    entries = json.loads(report.read_text())["log"]["entries"]
    (folder / "schemathesis.txt").write_text(done.stdout)
    return [
        (f"{one['request']['method']} {one['request']['url'][len(url) :]}", one["response"]["status"])
        for one in entries
    ]
