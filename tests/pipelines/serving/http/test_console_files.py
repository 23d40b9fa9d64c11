"""How the console's files are sent."""

import re

import httpx
import pytest

from pipelines.serving.http.console_files import FOLDER, HEADERS
from tests.pipelines.serving.console_server import MAX_BODY_BYTES, ToyServer


@pytest.fixture(scope="module")
def ask():
    http = ToyServer().http

    def request(path, method="GET", **headers):
        import asyncio

        async def run():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(http), base_url="http://test") as session:
                return await session.request(method, path, headers=headers)

        return asyncio.run(run())

    return request


def test_every_file_is_sent_as_what_it_is_and_keeps_to_itself(ask):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in FOLDER.iterdir():
        answer = ask("/" if file.name == "index.html" else f"/console/{file.name}")
        assert answer.status_code == 200 and answer.content == file.read_bytes()
        assert answer.headers["content-type"].split(";")[0] == types[file.suffix]
        assert HEADERS.items() <= {name.title(): value for name, value in answer.headers.items()}.items()
    policy = ask("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "//" not in policy


def test_the_page_needs_nothing_inline_and_nothing_from_elsewhere():
    sources = {file.name: file.read_text() for file in FOLDER.iterdir()}
    page = sources["index.html"]
    assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", page)
    assert all(
        f'src="console/{name}"' in page or "src=" not in tag
        for tag, name in re.findall(r"(<script[^>]*?(?:console/(\S+?)\")?>)", page)
    )
    for name, source in sources.items():
        found = set(re.findall(r"https?://[^\s\"')]+", source))
        assert found <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", source), name


def test_unchanged_files_are_not_sent_again(ask):
    first = ask("/console/console.js")
    again = ask("/console/console.js", **{"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert ask("/console/console.js", **{"If-None-Match": '"other"'}).status_code == 200
    assert ask("/console/console.css").headers["etag"] != first.headers["etag"]
    assert ask("/", "HEAD").status_code == 200


def test_no_other_file_can_be_named(ask):
    for path in ("/console/", "/console/..%2fconsole_files.py", "/console/../console_files.py", "/console/x.js"):
        assert ask(path).status_code == 404


def test_the_page_learns_the_limit(ask):
    answer = ask("/console/limits.json")
    assert answer.json() == {"max_body_bytes": MAX_BODY_BYTES}
    assert answer.headers["x-content-type-options"] == "nosniff"
