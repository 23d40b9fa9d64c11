"""Storage that fails while sources are read: what passes is waited out, the rest stops the run; no row is blamed."""

import io
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data import storage
from pipelines.data.corpus.sources.files import open_source
from pipelines.data.storage import retries
from pipelines.data.storage.retries import with_retries
from qformer.errors import UserError
from tests.pipelines.data.builders import jpeg
from tests.pipelines.data.corpus.sources.reading import read
from tests.pipelines.data.corpus.sources.shards import write_shard

NUM_FAILURES = 2
NUM_ROWS = 40


class _TiredFile(io.BytesIO):
    """Breaks off in the middle."""

    def read(self, size=-1):
        FailingFileSystem.fail("read")
        return super().read(size)


class FailingFileSystem(MemoryFileSystem):
    """Each kind of request fails a few times."""

    protocol = "failing"
    store = {}
    pseudo_dirs = [""]
    left: dict[str, int] = {}
    error: Exception = ConnectionResetError("reset by peer")

    @classmethod
    def fail(cls, what):
        if cls.left.get(what, 0):
            cls.left[what] -= 1
            raise cls.error

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        self.fail("open")
        with super()._open(path, mode, **options) as file:
            return _TiredFile(file.getvalue())

    def cat_file(self, path, start=None, end=None, **options):
        self.fail("range")
        return super().cat_file(path, start, end, **options)

    def find(self, path, **options):
        self.fail("list")
        return super().find(path, **options)

    def info(self, path, **options):
        self.fail("info")
        return super().info(path, **options)


@pytest.fixture
def failing(monkeypatch):
    """Sets which requests fail, with what and how often; the pauses are short."""
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    FailingFileSystem.store.clear()
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)

    def set_failures(error, times=NUM_FAILURES, requests=("open", "read", "range", "list", "info")):
        monkeypatch.setattr(FailingFileSystem, "error", error)
        FailingFileSystem.left = dict.fromkeys(requests, times)

    yield set_failures
    FailingFileSystem.left = {}


def _write_source(folder, kind):
    """A source of NUM_ROWS healthy rows. Returns its URI."""
    rows = [{"media": f"{number}.jpg", "caption": f"caption {number}"} for number in range(NUM_ROWS)]
    if kind in ("folder", "webdataset"):
        members = []
        for number, row in enumerate(rows):
            sidecar = json.dumps({"caption": row["caption"]}) if number % 2 else row["caption"]
            members += [(f"{number}.jpg", jpeg()), (f"{number}.{('txt', 'json')[number % 2]}", sidecar.encode())]
        if kind == "folder":
            for name, content in members:
                storage.write_bytes(f"failing://b/folder/{name}", content)
            return "failing://b/folder"
        path = write_shard(folder / "a.tar", members)
    elif kind == "parquet":
        path = folder / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path = folder / f"a.{'json' if kind == 'lavis' else kind}"
        path.write_text(
            {
                "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
                "csv": "media,caption\n" + "".join(f"{row['media']},{row['caption']}\n" for row in rows),
                "lavis": json.dumps([{"image": row["media"], "caption": row["caption"]} for row in rows]),
            }[kind]
        )
    storage.write_bytes(f"failing://b/{path.name}", path.read_bytes())
    return f"failing://b/{path.name}"


KINDS = ["parquet", "jsonl", "csv", "lavis", "folder", "webdataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried(tmp_path, failing, kind):
    uri = _write_source(tmp_path, kind)
    failing(ConnectionResetError("reset by peer"))
    rows, failures = read(uri)
    assert failures == []
    assert sorted(row["captions"][0] for row in rows) == sorted(f"caption {number}" for number in range(NUM_ROWS))
    assert FailingFileSystem.left["read" if kind != "webdataset" else "range"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "text"),
    [(PermissionError(13, "denied"), "access denied"), (ConnectionResetError("reset by peer"), "reset by peer")],
)
def test_persistent_failures_stop_the_run(tmp_path, failing, monkeypatch, kind, error, text):
    """One line for the user; not a quarantine row, which would lose a healthy sample."""
    uri = _write_source(tmp_path, kind)
    failing(error, times=10**6, requests=("read", "range"))
    monkeypatch.setattr(with_retries, "__kwdefaults__", {"budget_s": 0.05})
    with pytest.raises(UserError, match=text) as caught:
        read(uri)
    assert str(caught.value).startswith(f"cannot read source {uri}: ") and "\n" not in str(caught.value)


def test_a_file_is_read_on_after_a_failure(failing):
    content = bytes(range(256)) * 20_000
    storage.write_bytes("failing://b/a", content)
    with open_source("failing://b/a") as file:
        assert file.read(100) == content[:100]
        failing(ConnectionResetError("reset by peer"))
        assert file.read(3_000_000) == content[100:3_000_100]
        assert file.seek(-10, io.SEEK_END) == len(content) - 10 and file.read() == content[-10:]
        failing(ConnectionResetError("reset by peer"))
        assert file.seek(0) == 0 and file.read() == content


def test_a_file_that_changes_meanwhile_is_not_read_on(failing):
    storage.write_bytes("failing://b/a", bytes(3_000_000))
    with open_source("failing://b/a") as file:
        file.read(1)
        storage.write_bytes("failing://b/a", bytes(4_000_000))
        failing(ConnectionResetError("reset by peer"))
        with pytest.raises(Exception, match="changed while it was read"):
            file.read()
