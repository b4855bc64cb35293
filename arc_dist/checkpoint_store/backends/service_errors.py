"""What the errors of object stores and of their client libraries mean here."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator
from typing import Any, cast

from arc_dist.checkpoint_store.backends.base import store_error
from arc_dist.errors import (
    ArcError,
    Fenced,
    StoreCorrupt,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreTransient,
)

_DENIED_CODES = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}
_FULL_CODES = {"QuotaExceeded", "QuotaExceededException", "EntityTooLarge", "507"}
_GONE_CODES = {"NoSuchBucket", "NoSuchKey", "404"}
_SHORTER_CODES = {"InvalidRange", "416"}
_CONFLICT_CODES = {"PreconditionFailed", "412"}
MADE_CODES = {*_CONFLICT_CODES, "NoSuchUpload"}  # also told to who repeats a request that was carried out
_BUSY_CODES = {
    "ConditionalRequestConflict",
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "500",
    "502",
    "503",
    "504",
    # An upload whose parts were lost on the way, or that a lifecycle rule has ended: another one may succeed.
    "BadDigest",
    "IncompleteBody",
    "InvalidPart",
    "NoSuchUpload",
}
_CLIENT_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "asyncio")


class NameTakenError(Exception):
    """A conditional create was refused."""


@contextlib.contextmanager
def translated(doing: str, where: str) -> Generator[None]:
    """Turns errors of a client library in its block into errors of our tree, or into `NameTakenError`.

    Args:
        doing: what is being done, for the message: ``"writing"``.
        where: the file or directory, without credentials.
    """
    try:
        yield
    except (ArcError, NameTakenError):
        raise
    except FileExistsError as error:
        raise NameTakenError from error
    except Exception as error:  # client libraries raise errors of their own that are no OSError
        found = _meaning(error, doing, where)
        if found is None:
            raise
        raise found from error


def fenced(where: str) -> Fenced:
    """The error of a name that another writer has taken."""
    return Fenced(
        f"{where} exists already: another process writes this attempt at the step. Two runs must not share one run "
        "name.",
        file=where,
    )


def service_code(error: BaseException | None) -> str:
    """The service's own error code (``"NoSuchBucket"``), looked for along the chain of causes; '' without one."""
    for _ in range(8):
        if error is None:
            break
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(cast("dict[str, Any]", response).get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def _meaning(error: Exception, doing: str, where: str) -> Exception | None:
    """Our error for a client library's. Only codes are quoted: its text may hold more than one wants in a log."""
    code = service_code(error)
    fields: dict[str, object] = {"file": where, "code": code}
    if code in _CONFLICT_CODES:
        return NameTakenError(where)
    if code in _FULL_CODES:
        return StoreFull(f"{doing} {where}: {code}. Raise the quota, or choose another store.", **fields)
    if code in _DENIED_CODES or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StoreDenied(
            f"{doing} {where}: {code or 'no credentials found'}. Check the credentials and the rights of this user.",
            **fields,
        )
    if code in _SHORTER_CODES:
        return StoreCorrupt(
            f"{doing} {where}: shorter than it was. Restore it from a copy, or an older step.", **fields
        )
    if code in _GONE_CODES:
        return StoreGone(f"{doing} {where}: {code}. Create the bucket, or correct the URL.", **fields)
    if code in _BUSY_CODES:
        return StoreTransient(f"{doing} {where}: {code}. It may succeed when tried again.", **fields)
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return store_error(error, doing, where)
    if type(error).__module__.split(".")[0] in _CLIENT_PACKAGES:
        return StoreTransient(f"{doing} {where}: {type(error).__name__}. It may succeed when tried again.", **fields)
    if isinstance(error, OSError):
        return StoreError(f"{doing} {where}: {code or 'invalid argument'}. Look at the service's own log.", **fields)
    return None
