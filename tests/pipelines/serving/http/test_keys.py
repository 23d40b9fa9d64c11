"""API keys and their limits."""

import json
import stat

import pytest

from jobs.cli import main as cli
from pipelines.serving.app.quotas import Quotas
from pipelines.serving.contract.config import ApiKey
from pipelines.serving.contract.errors import ApiError, Refusal
from pipelines.serving.http.keys import KeyTable, keys_json, make_key, read_keys
from qformer.errors import UserError


def test_a_key_opens_and_its_file_does_not_tell_it():
    secret, kept = make_key("alice", 60, 4)
    other, _ = make_key("bob")
    assert secret != other and len(secret) > 40
    content = keys_json([kept])
    assert secret not in content and secret[3:] not in content
    ring = KeyTable(read_keys(content.encode(), "keys.json"))
    assert ring.identify(f"Bearer {secret}") == kept == ring.identify(f"bearer  {secret} ")
    for wrong in (None, "", secret, f"Basic {secret}", f"Bearer {other}", f"Bearer {secret}x", f"Bearer {kept.sha256}"):
        with pytest.raises(ApiError) as caught:
            ring.identify(wrong)
        assert caught.value.status == 401
    assert KeyTable().identify(None) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}x",
        b"\xff",
        b"[1]",
        b'[{"name": "a"}]',
        b'[{"name": "", "sha256": "%s"}]' % (b"0" * 64),
        b'[{"name": "a", "sha256": "0"}]',
        b'[{"name": "a", "sha256": "%s", "max_concurrent": 0}]' % (b"0" * 64),
        b'[{"name": "a", "sha256": "%s", "requests_per_minute": "x"}]' % (b"0" * 64),
        b'[{"name": "a", "sha256": "%s", "extra": 1}]' % (b"0" * 64),
        b'[{"name": "a", "sha256": "%s"}, {"name": "a", "sha256": "%s"}]' % (b"0" * 64, b"1" * 64),
    ],
)
def test_damaged_key_files(content):
    with pytest.raises(UserError, match=r"api_keys='keys\.json'") as caught:
        read_keys(content, "keys.json")
    assert "0000" not in str(caught.value)


def test_the_command_makes_keys(tmp_path, capsys):
    file = tmp_path / "keys.json"

    def made(name, *more):
        code = cli.main(["serve", "--make-key", name, "--set", f"api_keys={file}", *more])
        return code, capsys.readouterr()

    secrets = {name: made(name, "--set", "requests_per_minute=90")[1].out.strip() for name in ("alice", "bob")}
    keys = read_keys(file.read_bytes(), "x")
    assert [(key.name, key.requests_per_minute) for key in keys] == [("alice", 90.0), ("bob", 90.0)]
    assert KeyTable(keys).identify(f"Bearer {secrets['bob']}").name == "bob"
    code, told = made("alice")
    assert code == 2 and "'alice'" in told.err and len(json.loads(file.read_text())) == 2
    assert not stat.S_IMODE(file.stat().st_mode) & 0o077


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def test_the_rate_is_a_bucket_that_fills_with_time():
    clock = Clock()
    quotas, key = Quotas(60.0, clock), ApiKey(name="a", sha256="0" * 64, requests_per_minute=30)
    taken = [quotas.take(key) for _ in range(7)]
    assert [isinstance(one, Refusal) for one in taken] == [False] * 5 + [True] * 2
    assert (taken[-1].status, taken[-1].retry_after_s) == (429, 2)
    clock.now_s += 2.0
    assert not isinstance(quotas.take(key), Refusal) and isinstance(quotas.take(key), Refusal)
    clock.now_s += 3600.0
    assert sum(not isinstance(quotas.take(key), Refusal) for _ in range(20)) == 5
    other = ApiKey(name="b", sha256="1" * 64, requests_per_minute=30)
    assert not isinstance(quotas.take(other), Refusal)


def test_leases_bound_what_is_in_work_and_end_by_themselves():
    clock = Clock()
    quotas, key = Quotas(60.0, clock), ApiKey(name="a", sha256="0" * 64, max_concurrent=2)
    first, second = quotas.take(key), quotas.take(key)
    assert quotas.take(key).code == "too_many_concurrent_requests"
    quotas.give_back(key, first)
    quotas.give_back(key, first)  # twice changes nothing
    third = quotas.take(key)
    assert isinstance(third, int) and isinstance(quotas.take(key), Refusal)
    clock.now_s += 61.0  # an ingress replica died with both
    assert isinstance(quotas.take(key), int)
    quotas.give_back(key, second)
    assert isinstance(quotas.take(key), int) and isinstance(quotas.take(key), Refusal)
