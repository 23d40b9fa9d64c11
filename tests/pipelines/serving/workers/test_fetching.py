"""Remote media against a real server on loopback; names and the network between are the test's own."""

import asyncio
import contextlib
import http.server
import threading

import httpcore
import pytest

from pipelines.serving.contract.config import FetchPolicy
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.workers.addresses import is_public
from pipelines.serving.workers.fetching import Fetcher
from tests.media_files import jpeg_bytes

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",  # carriers' own
        "169.254.169.254",  # metadata of clouds
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "192.88.99.1",  # relays of 6to4
        "198.18.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:192.88.99.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "",
    ],
)
def test_addresses_that_are_not_the_public_internet(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


class Site(http.server.BaseHTTPRequestHandler):
    """One server for all hosts."""

    def do_GET(self):  # noqa: N802
        self.server.seen.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.server.targets[self.path])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/slow":
            self.server.released.wait(5)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(10_000))
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(jpeg_bytes())

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.seen, server.targets, server.released = [], {}, threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Network(httpcore.AsyncNetworkBackend):
    """Stands between: every connection ends at the site; keeps where it would have gone."""

    def __init__(self, site):
        self.inner, self.port, self.connected = httpcore.AnyIOBackend(), site.server_address[1], []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.connected.append((host, port))
        return await self.inner.connect_tcp("127.0.0.1", self.port, timeout)


class Names:
    """A resolver; a name with several answers gives one after the other."""

    def __init__(self, **answers):
        self.answers, self.asked = {name.replace("_", "."): list(many) for name, many in answers.items()}, []

    async def __call__(self, host, port):
        self.asked.append(host)
        answers = self.answers[host.rstrip(".")]
        return answers.pop(0) if len(answers) > 1 else answers[0]


POLICY = {"hosts": ("img.example", "*.cdn.example"), "allow_http": True, "max_bytes": 100_000, "timeout_s": 2.0}


def fetched(site, url, names=None, **policy):
    names = names or Names(img_example=[[PUBLIC]], a_cdn_example=[["8.8.8.8"]])
    network = Network(site)
    fetcher = Fetcher(FetchPolicy(**POLICY | policy), names, network)
    try:
        return asyncio.run(fetcher.fetch(url)), network, names
    except ApiError as error:
        return error, network, names


def test_an_allowed_host_is_fetched_from_the_address_that_was_checked(site):
    content, network, names = fetched(site, "http://img.example/a.jpg?x=1#part")
    assert content == jpeg_bytes() and network.connected == [(PUBLIC, 80)] and names.asked == ["img.example"]
    assert site.seen == [("img.example", "/a.jpg?x=1")]
    assert fetched(site, "http://a.cdn.example/b")[0] == jpeg_bytes()
    assert fetched(site, "http://IMG.example./b")[0] == jpeg_bytes()


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://other.example/", 403),
        ("http://cdn.example/", 403),  # "*." covers names below
        ("http://evilcdn.example/", 403),
        ("http://img.example.evil.com/", 403),
        ("http://127.0.0.1/", 403),
        ("http://[::1]/", 403),
        ("http://img.example:22/", 403),
        ("http://img.example:6379/", 403),
        ("http://user:secret@img.example/", 400),
        ("http://img.example@127.0.0.1/", 400),
        ("file:///etc/passwd", 400),
        ("ftp://img.example/a", 400),
        ("gopher://img.example/_x", 400),
        ("data:text/plain,x", 400),
        ("//img.example/a", 400),
        ("http://", 400),
        ("http://img.example/a b", 400),
        ("http://img.example/\r\nHost: x", 400),
        ("http://img.example:99999/", 400),
        ("http://[::1", 400),
        ("http://img.example/" + "a" * 3000, 400),
        ("http://img.example/ä", 400),
        ("http://\N{KELVIN SIGN}.cdn.example/", 400),  # its small letter is the usual k
        ("http://img.example../", 403),
    ],
)
def test_refused_before_any_connection(site, url, status):
    error, network, names = fetched(site, url)
    assert (error.status, network.connected, names.asked) == (status, [], [])


def test_plain_http_and_all_hosts_are_off_by_default(site):
    assert fetched(site, "http://img.example/a", allow_http=False)[0].status == 400
    assert fetched(site, "https://img.example/a", hosts=())[0].status == 403


@pytest.mark.parametrize(
    "answer", [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], [PUBLIC, "127.0.0.1"], ["fe80::1"], []]
)
def test_a_name_of_a_private_address_is_refused(site, answer):
    error, network, _ = fetched(site, "http://img.example/a", Names(img_example=[answer]))
    assert (error.status, error.code, network.connected) == (403, "url_not_allowed", [])


def test_a_name_that_changes_its_address_gains_nothing(site):
    # Whoever resolved twice would check the first answer and connect to the second.
    names = Names(img_example=[[PUBLIC], ["127.0.0.1"]])
    content, network, _ = fetched(site, "http://img.example/a", names)
    assert content == jpeg_bytes() and network.connected == [(PUBLIC, 80)] and names.asked == ["img.example"]


@pytest.mark.parametrize("host", ["a..cdn.example", ".cdn.example", "a" * 64 + ".cdn.example"])
def test_names_that_no_resolver_takes_are_refused(site, host):
    async def resolver(host, port):
        host.encode("idna")  # as the system's does
        raise AssertionError("it takes it")

    error, network, _ = fetched(site, f"http://{host}/", resolver)
    assert (error.status, error.code, network.connected) == (400, "invalid_url", [])


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://127.0.0.1/admin", 403),
        ("http://other.example/", 403),
        ("http://img.example:8080/", 403),
        ("file:///etc/passwd", 400),
        ("//[::1", 400),
        ("//169.254.169.254/latest/meta-data/", 403),
        ("http://inner.cdn.example/", 403),  # allowed by name, private by address
    ],
)
def test_redirects_are_checked_like_the_first_url(site, target, status):
    site.targets["/to/x"] = target
    names = Names(img_example=[[PUBLIC]], inner_cdn_example=[["10.0.0.7"]])
    error, network, _ = fetched(site, "http://img.example/to/x", names)
    assert error.status == status and network.connected == [(PUBLIC, 80)]


def test_redirects_are_followed_up_to_a_limit(site):
    site.targets |= {"/to/a": "/to/b", "/to/b": "http://a.cdn.example/end", "/to/loop": "/to/loop"}
    assert fetched(site, "http://img.example/to/a")[0] == jpeg_bytes()
    error, _, _ = fetched(site, "http://img.example/to/loop")
    assert error.status == 422 and len([path for _, path in site.seen if path == "/to/loop"]) == 4


def test_size_time_and_failures(site):
    large, _, _ = fetched(site, "http://img.example/endless")
    slow, _, _ = fetched(site, "http://img.example/slow", timeout_s=0.3)
    missing, _, _ = fetched(site, "http://img.example/missing")
    assert [(e.status, e.code) for e in (large, slow, missing)] == [
        (422, "media_too_large"),
        (422, "url_unreachable"),
        (422, "url_unreachable"),
    ]

    class Nobody(Names):
        async def __call__(self, host, port):
            raise OSError("no such name")

    assert fetched(site, "http://img.example/a", Nobody())[0].code == "url_unreachable"
