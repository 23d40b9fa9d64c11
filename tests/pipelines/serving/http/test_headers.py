"""Which names a service on loopback without keys answers to, and what else no head may hold."""

import asyncio
import logging

import pytest

from pipelines.serving.contract.errors import ApiError
from pipelines.serving.http.headers import check_headers
from pipelines.serving.http.keys import make_key
from tests.media_files import jpeg_bytes
from tests.pipelines.serving.answering import Models, client, post


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.2:1", "[::1]", "[::1]:80", None])
def test_names_of_this_machine(host):
    check_headers({} if host is None else {"host": host}, is_local=True)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example@localhost",
        "localhost:8000:9",
        "10.0.0.1",
        "0.0.0.0",
        "[::]",
        "[fe80::1]",
        "::1",
        "",
    ],
)
def test_other_names(host):
    with pytest.raises(ApiError, match="ask it as localhost") as caught:
        check_headers({"host": host}, is_local=True)
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("is_local", "has_keys", "statuses"),
    [(True, False, [403] * 5), (True, True, [401, 200, 200, 200, 404]), (False, False, [200, 200, 200, 200, 404])],
)
def test_every_page_is_kept_unless_keys_keep_them_or_the_service_is_open(is_local, has_keys, statuses):
    async def run():
        async with client(Models(), is_local=is_local, keys=[make_key("alice")[1]] if has_keys else ()) as session:
            paths = ("/v1/models", "/healthz", "/openapi.json", "/", "/nowhere")
            return [(await session.get(path, headers={"Host": "evil.example"})).status_code for path in paths]

    assert asyncio.run(run()) == statuses


@pytest.mark.parametrize("name", ["X-Request-Disconnect-Disabled", "x-request-timeout-seconds"])
def test_nobody_has_the_proxy_look_away(name):
    models = Models()
    response = post(models, "/v1/caption", content=jpeg_bytes(), headers={"Content-Type": "image/jpeg", name: "?1"})
    assert response.status_code == 400 and name.lower() in response.json()["error"]["message"]
    assert not models.pixels


@pytest.mark.parametrize(
    ("is_local", "host", "status", "code"),
    [(True, "[", 403, "host_not_allowed"), (False, "[", 404, "not_found"), (False, "localhost", 404, "not_found")],
)
def test_what_no_endpoint_sees_is_told_of_all_the_same(caplog, is_local, host, status, code):
    async def run():
        async with client(Models(), is_local=is_local) as session:
            return await session.get("/nowhere?secret=1", headers={"Host": host})

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        response = asyncio.run(run())
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    [line] = [record for record in caplog.records if record.name == "ray.serve"]
    assert (line.method, line.path, line.status, line.error) == ("GET", "/nowhere", status, code)
