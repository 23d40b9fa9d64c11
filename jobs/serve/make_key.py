"""Make an API key for a client of `qformer serve`."""

import os

from pydantic import Field

from jobs.settings.data import Settings
from pipelines.data import storage
from pipelines.serving.http.keys import MAX_KEY_FILE_BYTES, keys_json, make_key, read_keys
from qformer.errors import UserError


class MakeKeySettings(Settings):
    """`qformer serve --make-key NAME`."""

    name: str = Field(min_length=1, max_length=100)
    """Name of the client in logs and metrics; unique in the file."""
    api_keys: str = "keys.json"
    """Key file to extend (path or fsspec URI). It holds hashes, never the keys."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Request rate; null: no limit."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Concurrent requests; null: no limit."""


def main(settings: MakeKeySettings) -> None:
    """Make a key, add its hash to the file and print the key; it cannot be shown again.

    Raises:
        UserError: If the file is no key file, or has the name already.
    """
    file = settings.api_keys
    keys = read_keys(storage.read_bytes(file, MAX_KEY_FILE_BYTES), file) if storage.exists(file) else ()
    if any(key.name == settings.name for key in keys):
        raise UserError(
            f"api_keys={file!r} has a key of the name {settings.name!r}; choose another, or remove the entry"
        )
    secret, entry = make_key(settings.name, settings.requests_per_minute, settings.max_concurrent)
    storage.write_text(file, keys_json([*keys, entry]))
    if storage.is_local(file):
        os.chmod(storage.local_path(file), 0o600)
    print(secret)
