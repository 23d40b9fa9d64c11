"""Storage that fails: what passes is tried again, what is the run's own fault stops it."""

import errno
import http.server
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data import storage
from pipelines.data.corpus.quarantine import require_readable
from pipelines.data.failures import Failure, MediaError
from pipelines.data.media.samples import SampleDecoder
from pipelines.data.storage import retries
from pipelines.data.storage.retries import classify, with_retries
from qformer.errors import UserError
from tests.pipelines.data.builders import DECODE, jpeg


class FlakyFileSystem(MemoryFileSystem):
    """Fails as often as `failures` says before a file opens."""

    protocol = "flaky"
    store = {}
    pseudo_dirs = [""]
    failures: list[Exception] = []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb" and self.failures:
            raise self.failures.pop(0)
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def flaky():
    """The URI of a picture on a file system whose failures the test sets."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.failures = []
    with fsspec.open("flaky://bucket/a.jpg", "wb") as file:
        file.write(jpeg())
    return "flaky://bucket/a.jpg"


@pytest.fixture
def decoder():
    made = SampleDecoder(DECODE)
    yield made
    made.close()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.EIO, "input/output error"),
        OSError(errno.ESTALE, "stale file handle"),
        OSError(errno.EBUSY, "SlowDown"),
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
        RuntimeError("a kind of error that nobody knows"),
    ],
)
def test_what_may_pass_is_tried_again(flaky, decoder, failure):
    FlakyFileSystem.failures = [failure, failure]
    assert decoder.decode(kind="image", media=flaky).pixels.shape == (1, 3, 32, 32)
    assert FlakyFileSystem.failures == []


def test_what_does_not_pass_is_transient_and_never_corrupt(flaky):
    FlakyFileSystem.failures = [ConnectionResetError("reset by peer")] * 99
    with pytest.raises(MediaError) as caught:
        with_retries(flaky, lambda: storage.read_bytes(flaky, 10**6), budget_s=1.0)
    assert (caught.value.error_class, caught.value.stage) == ("transient", "read")
    assert 2 <= caught.value.tries == 99 - len(FlakyFileSystem.failures) <= 4


@pytest.mark.parametrize("chance", [0.5, 1.5])
def test_a_storage_that_is_away_for_a_minute_loses_no_row(monkeypatch, chance):
    """By a clock that sleeping alone moves; whatever the pauses are drawn to be."""
    now_s = [0.0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: now_s.__setitem__(0, now_s[0] + seconds))
    monkeypatch.setattr(retries._RANDOM, "uniform", lambda low, high: chance)

    def read():
        if now_s[0] < 75.0:
            raise ConnectionRefusedError("nobody listens")
        return b"back"

    assert with_retries("s3://bucket/a.jpg", read) == b"back"
    assert now_s[0] < 90.0


def test_local_read_errors_are_transient():
    """A file of this process' memory cannot be read at its beginning: a real EIO."""
    with pytest.raises(MediaError) as caught:
        with_retries("/proc/self/mem", lambda: storage.read_bytes("/proc/self/mem", 10**6), budget_s=0.5)
    assert caught.value.error_class == "transient" and caught.value.tries > 1


def test_a_verdict_is_not_tried_again():
    calls = []

    def read():
        calls.append(1)
        raise MediaError("corrupt", "damaged")

    with pytest.raises(MediaError, match="damaged"):
        with_retries("a.mp4", read)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("media", "error", "expected"),
    [
        ("/a.jpg", PermissionError(13, "denied"), "config"),
        ("/a.jpg", FileNotFoundError(2, "gone"), "missing"),
        ("/a.jpg/b", NotADirectoryError(20, "no folder"), "missing"),
        ("/" + "a" * 999, OSError(errno.ENAMETOOLONG, "too long"), "missing"),
        ("/a\0.jpg", ValueError("embedded null byte"), "missing"),
        ("/a", storage.NotRegularFileError("a pipe"), "unsupported"),
        ("/a", storage.FileTooLargeError("large"), "too_large"),
        ("s4://b/a", ValueError("Protocol not known: s4"), "config"),
        ("gs://b/a", ImportError("Please install gcsfs"), "config"),
        ("s3://b/a", OSError(errno.EINVAL, "AuthorizationHeaderMalformed"), "config"),
    ],
)
def test_classes(media, error, expected):
    found = classify(error, media, 3)
    assert (found.error_class, found.stage, found.tries) == (expected, "read", 3)


@pytest.mark.parametrize("media", ["nosuch://bucket/a.jpg", "gs://bucket/a.jpg", "s3://bucket/a.jpg"])
def test_mistakes_in_settings_stop_the_run_and_name_the_fix(decoder, media, monkeypatch, tmp_path):
    """An unknown protocol, a driver that is not installed, no credentials; each named with what to do."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.config.conf.clear()
    with pytest.raises(MediaError) as caught:
        decoder.decode(kind="image", media=media)
    error = caught.value
    assert (error.error_class, error.stage) == ("config", "read")
    with pytest.raises(UserError, match=r"s7.*bucket/a\.jpg.*(use|install|check)"):
        require_readable([Failure("s7", media, error.stage, error.error_class, error.message)])


def test_rows_that_are_wrong_themselves_stop_nothing(decoder):
    with pytest.raises(MediaError) as caught:
        decoder.decode(kind="audio", media="a.wav")
    error = caught.value
    require_readable([Failure("s1", "a.wav", error.stage, error.error_class, error.message)])


class S3Handler(http.server.BaseHTTPRequestHandler):
    """Answers as S3 does: by bucket name, with what it is named after."""

    answers = {"forbidden": (403, "AccessDenied"), "gone": (404, "NoSuchBucket"), "slow": (503, "SlowDown")}
    num_slow = 0
    content = jpeg()

    def _answer(self):
        bucket, _, key = self.path.lstrip("/").partition("?")[0].partition("/")
        status, code = self.answers.get(bucket, (200, ""))
        if bucket == "slow":
            S3Handler.num_slow += 1
            status, code = (503, "SlowDown") if S3Handler.num_slow <= 2 else (200, "")
        if status == 200 and key == "missing.jpg":
            status, code = 404, "NoSuchKey"
        content = self.content if key else b"<ListBucketResult></ListBucketResult>"
        if status != 200:
            content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD = _answer  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture
def s3(monkeypatch):
    """A server that speaks enough S3 to refuse, on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), S3Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("media", "expected", "text"),
    [
        ("s3://forbidden/a.jpg", "config", "access denied"),
        ("s3://gone/a.jpg", "config", "no such bucket"),
        ("s3://there/missing.jpg", "missing", "no file"),
    ],
)
def test_what_s3_refuses(s3, decoder, media, expected, text):
    with pytest.raises(MediaError, match=text) as caught:
        decoder.decode(kind="image", media=media)
    assert (caught.value.error_class, caught.value.stage) == (expected, "read")


def test_a_throttling_s3_is_waited_for(s3, decoder):
    assert decoder.decode(kind="image", media="s3://slow/a.jpg").pixels.shape == (1, 3, 32, 32)
    assert S3Handler.num_slow > 2
