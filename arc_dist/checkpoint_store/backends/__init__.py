"""Places that keep files, and what each of them can do."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from arc_dist.checkpoint_store.backends.base import Backend, Capabilities, Entry, Sink, Source, Unsupported, is_missing
from arc_dist.checkpoint_store.backends.local import LocalBackend
from arc_dist.checkpoint_store.backends.remote import RemoteBackend
from arc_dist.errors import ConfigError

__all__ = [
    "Backend",
    "Capabilities",
    "Entry",
    "LocalBackend",
    "RemoteBackend",
    "Sink",
    "Source",
    "Unsupported",
    "is_missing",
    "open_backend",
]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_backend(url: str | os.PathLike[str]) -> Backend:
    """The backend of a path or a URL. Touches nothing yet.

    Raises:
        ConfigError: the URL is empty or cannot be understood.
    """
    text = os.fspath(url)
    if not text.strip():
        raise ConfigError("the store's path is empty. Name a directory or a URL such as s3://bucket/prefix.")
    if not _SCHEME.match(text):
        return LocalBackend(Path(text).expanduser().absolute())
    parts = urlsplit(text)
    if parts.scheme in ("file", "local"):
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"store {text}: a file URL has three slashes: file:///{parts.netloc}{parts.path}")
        return LocalBackend(Path(unquote(parts.path)))
    return RemoteBackend(text.rstrip("/"))
