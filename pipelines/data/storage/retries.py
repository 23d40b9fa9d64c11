"""Retries, and the classes of storage failures: transient ones, the file's own, and those that stop a run."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec

from pipelines.data import storage
from pipelines.data.failures import ErrorClass, MediaError

ValueT = TypeVar("ValueT")

RETRY_BUDGET_S = 120.0
"""Time after which no new try begins, pauses included: an outage of a minute is waited for."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.25, 8.0
_BUCKET_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss")
_TRANSIENT_STATUS = (408, 409, 412, 416, 425, 429)
"""HTTP statuses of timeouts, throttling, and files that were being replaced."""
_LOCAL_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_REFUSALS = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, getattr(errno, "EREMCHG", errno.EINVAL))
# By name, because their libraries are imported only where a storage needs them.
_CREDENTIAL_ERRORS = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigParseError", "NoRegionError"),
    *("ParamValidationError", "DefaultCredentialsError", "RefreshError", "UnauthorizedSSOTokenError"),
)
# Pauses need no reproducibility, and the seeded generators must stay as they are.
_RANDOM = random.SystemRandom()


def with_retries(media: str, read: Callable[[], ValueT], *, budget_s: float = RETRY_BUDGET_S) -> ValueT:
    """Call `read` until it succeeds, fails for good, or has failed transiently for `budget_s`.

    The pauses double from a quarter of a second to eight, each drawn between half and one and a half of that.

    Args:
        media: Path or URI that is read, for messages.
        read: Function that may raise anything; a MediaError other than "transient" is final.
        budget_s: Time after which no new try begins. A single try may take longer, because remote file systems have
            their own timeouts.

    Raises:
        MediaError: At stage "read", of the class that `classify` gives, with the number of tries.
    """
    start_s = time.monotonic()
    pause_s = _FIRST_PAUSE_S
    tries = 0
    while True:
        tries += 1
        try:
            return read()
        except MediaError as error:
            if error.error_class != "transient":
                raise
            failure = MediaError("transient", error.message, stage="read", tries=tries)
            cause: Exception = error
        except Exception as error:  # remote file systems raise their own types
            failure, cause = classify(error, media, tries), error
            if failure.error_class != "transient":
                raise failure from error
        wait_s = pause_s * _RANDOM.uniform(0.5, 1.5)
        if time.monotonic() + wait_s - start_s > budget_s:
            raise failure from cause
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def classify(error: Exception, media: str, tries: int = 1) -> MediaError:
    """Classify a failed read.

    Class "config" at stage "read" is the run's own fault and stops it (`quarantine.require_readable`): no
    permission, bad credentials, no such bucket, unknown protocol, missing driver. Unknown errors count as
    transient, so that they are tried again and never called corrupt.

    Args:
        error: Error that was raised.
        media: Path or URI.
        tries: Number of attempts.
    """
    error_class, message = _class_and_message(error, media)
    return MediaError(error_class, message, stage="read", tries=tries)


def _class_and_message(error: Exception, media: str) -> tuple[ErrorClass, str]:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, storage.FileTooLargeError):
        return "too_large", str(error)
    if isinstance(error, storage.TruncatedFileError):
        return "corrupt", str(error)
    if isinstance(error, (storage.NotRegularFileError, IsADirectoryError)):
        return "unsupported", str(error)
    if isinstance(error, ImportError):
        return "config", f"{media}: the driver of this file system is not installed ({error}); install it everywhere"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if _bucket_is_missing(media):
            return "config", f"{media}: there is no such bucket; correct the path, or the endpoint that is asked for it"
        return "missing", f"no file at {media}"
    if storage.is_local(media):
        return _classify_local(error, media, text)
    return _classify_remote(error, media, text)


def _classify_local(error: Exception, media: str, text: str) -> tuple[ErrorClass, str]:
    if isinstance(error, PermissionError):
        return "config", f"{media}: no permission to read it; change its mode, or run as a user who may"
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in _LOCAL_PATH_ERRORS):
        return "missing", f"this can be no path: {text}"
    return "transient", text


def _classify_remote(error: Exception, media: str, text: str) -> tuple[ErrorClass, str]:
    status = _http_status(error)
    names = {base.__name__ for base in type(error).__mro__}
    if status is not None and (status in _TRANSIENT_STATUS or status >= 500):
        return "transient", text
    if status == 404:
        return "missing", f"no file at {media}"
    if isinstance(error, PermissionError) or names.intersection(_CREDENTIAL_ERRORS) or status in (401, 403):
        return "config", (
            f"{media}: access denied ({text}); check the credentials in the environment and the bucket's policy (S3 "
            "answers so for missing files too where listing is not allowed)"
        )
    if isinstance(error, ValueError) and "rotocol not known" in str(error):
        protocols = ", ".join(sorted({"s3", "gs", "https", "file"} & set(fsspec.available_protocols())))
        return "config", f"{media}: no such protocol; use a local path or one of {protocols}, ..."
    is_refused = isinstance(error, OSError) and error.errno in _REFUSALS
    if is_refused or isinstance(error, ValueError) or status is not None:
        return "config", f"{media}: the request was refused ({text}); check bucket name, region and endpoint"
    return "transient", text


def _http_status(error: Exception) -> int | None:
    """The HTTP status of an error, from the attributes that botocore, aiohttp, requests and gcsfs set."""
    for current in (error, error.__cause__):
        response = getattr(current, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            response = getattr(response, "status_code", None)
        for found in (response, getattr(current, "status", None), getattr(current, "code", None)):
            if str(found).isdecimal() and 100 <= int(str(found)) < 600:
                return int(str(found))
    return None


def _bucket_is_missing(media: str) -> bool:
    protocol, _, path = media.partition("://")
    if protocol not in _BUCKET_PROTOCOLS:
        return False
    bucket = path.split("/")[0]
    try:
        filesystem, root = fsspec.core.url_to_fs(f"{protocol}://{bucket}")
        return not filesystem.exists(root)
    except Exception:  # another failure of the storage: the error of the file itself counts
        return False
