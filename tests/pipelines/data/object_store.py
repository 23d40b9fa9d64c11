"""A real S3 server for tests: moto, in an environment of its own, on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def moto_program(folder: Path) -> str:
    """The server's program: that of QFORMER_TEST_MOTO, or one installed below `folder`; skips where neither can be."""
    if named := os.environ.get("QFORMER_TEST_MOTO"):
        return named
    environment = folder / "moto"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [environment / "bin/pip", "install", "--quiet", "moto[s3,server]>=5"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"moto cannot be installed, and QFORMER_TEST_MOTO names none: {done.stderr[-200:]}")
    return str(environment / "bin/moto_server")


@contextlib.contextmanager
def s3_server(program: str) -> Iterator[str]:
    """Run a server; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/moto-api/", timeout=2).close()
                break
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()
