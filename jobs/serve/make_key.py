"""Make an API key for a client of `qformer serve`."""

import os

from pydantic import Field

from jobs.settings.data import Settings
from pipelines.data import storage
from pipelines.serving.http.keys import keys_json, make_key, read_keys
from qformer.errors import UserError

MAX_FILE_BYTES = 2**20


class MakeKeySettings(Settings):
    """`qformer serve --make-key NAME`."""

    name: str = Field(min_length=1, max_length=100)
    """Whose it is, for logs and metrics; none twice."""
    api_keys: str = "keys.json"
    """File to add it to (path or fsspec URI). It holds hashes, from which nobody gets the keys."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """null: no limit."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Requests in work at a time; null: no limit."""


def main(settings: MakeKeySettings) -> None:
    """Add a key to the file and print it, this once.

    Raises:
        UserError: If the file is no key file, or has the name already.
    """
    file = settings.api_keys
    keys = read_keys(storage.read_bytes(file, MAX_FILE_BYTES), file) if storage.exists(file) else ()
    if any(key.name == settings.name for key in keys):
        raise UserError(
            f"api_keys={file!r} has a key of the name {settings.name!r}; choose another, or remove the entry"
        )
    secret, kept = make_key(settings.name, settings.requests_per_minute, settings.max_concurrent)
    storage.write_text(file, keys_json([*keys, kept]))
    if storage.is_local(file):
        os.chmod(storage.local_path(file), 0o600)
    print(secret)
