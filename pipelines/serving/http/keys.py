"""API keys: random, stored as hashes, compared in constant time."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipelines.serving.contract.config import ApiKey
from pipelines.serving.contract.errors import ApiError
from qformer.errors import UserError

PREFIX = "qf-"
MAX_KEY_FILE_BYTES = 2**20


def make_key(
    name: str, requests_per_minute: float | None = None, max_concurrent: int | None = None
) -> tuple[str, ApiKey]:
    """Make a key. Returns the secret for the client and the hashed entry for the key file."""
    secret = PREFIX + secrets.token_urlsafe(32)
    entry = ApiKey(
        name=name, sha256=_hash(secret), requests_per_minute=requests_per_minute, max_concurrent=max_concurrent
    )
    return secret, entry


def keys_json(keys: Sequence[ApiKey]) -> str:
    """Serialise keys for a key file."""
    return json.dumps([asdict(key) for key in keys], indent=1) + "\n"


def read_keys(content: bytes, place: str) -> tuple[ApiKey, ...]:
    """Parse a key file.

    Args:
        content: Content of the file.
        place: Path of the file, for messages, which never name a value.

    Raises:
        UserError: If it is damaged, or a name or a hash occurs twice.
    """
    fix = "make it with `qformer serve --make-key NAME`"
    try:
        keys = tuple(ApiKey(**values) for values in json.loads(content))
    except (ValueError, TypeError) as error:
        raise UserError(f"api_keys={place!r} is no key file ({type(error).__name__}); {fix}") from None
    for number, key in enumerate(keys, 1):
        if not _is_valid(key):
            raise UserError(f"api_keys={place!r}: entry {number} is damaged; {fix}")
    if len({key.name for key in keys}) < len(keys) or len({key.sha256 for key in keys}) < len(keys):
        raise UserError(f"api_keys={place!r}: a name or a key is given twice; remove one of the two entries")
    return keys


class KeyTable:
    """The keys of a service.

    Args:
        keys: Accepted keys; empty lets everybody in.
    """

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def identify(self, authorization: str | None) -> ApiKey | None:
        """Find the key of the header `Authorization: Bearer KEY`; None if the service has no keys.

        Raises:
            ApiError: 401 if the key is missing or wrong.
        """
        if not self._keys:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            message = "this server wants an API key; send the header `Authorization: Bearer KEY`"
            raise ApiError(401, "missing_api_key", message)
        sent = _hash(secret.strip())
        found = None
        for key in self._keys:  # no early exit: the time must not depend on the key
            if hmac.compare_digest(key.sha256.encode(), sent.encode()):
                found = key
        if found is None:
            raise ApiError(401, "invalid_api_key", "the API key is not known; check the Authorization header")
        return found


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _is_valid(key: ApiKey) -> bool:
    numbers: tuple[Any, Any] = (key.requests_per_minute, key.max_concurrent)
    return (
        isinstance(key.name, str)
        and bool(key.name)
        and isinstance(key.sha256, str)
        and len(key.sha256) == 64
        and all(one is None or (isinstance(one, int | float) and one > 0) for one in numbers)
    )
