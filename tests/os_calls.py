"""The system calls of the local backend, seen and ruled by a test: recorded, refused, cut short.

The backend calls the functions of `os` (and `fallocate` through `local._reserve`). `OsCalls` stands between for paths
below one directory and for descriptors that were opened there; all other calls pass untouched.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arc_dist.checkpoint_store.backends import local

BY_PATH = ("open", "mkdir", "rmdir", "rename", "link", "unlink", "scandir", "stat")
BY_DESCRIPTOR = ("write", "fsync", "close", "fstat", "preadv")
NAMESPACE_AND_DATA = {"open", "mkdir", "rmdir", "rename", "link", "unlink", "write", "fsync", "fallocate"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call. `paths` are below the root; for a descriptor, the path it was opened with."""

    name: str
    paths: tuple[str, ...]
    arguments: tuple[Any, ...]
    descriptor: int | None = None


class OsCalls:
    """Overridden by tests: `rule` decides what happens, `done` hears what has happened."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.open_paths: dict[int, str] = {}
        self.double_closes: list[int] = []
        self.lock = threading.RLock()
        self.real = {name: getattr(os, name) for name in (*BY_PATH, *BY_DESCRIPTOR)}
        self.real["fallocate"] = local._reserve

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in BY_PATH:
            monkeypatch.setattr(os, name, self._by_path(name))
        for name in BY_DESCRIPTOR:
            monkeypatch.setattr(os, name, self._by_descriptor(name))
        monkeypatch.setattr(local, "_reserve", self._by_descriptor("fallocate"))

    def rule(self, call: Call) -> Callable[[], Any]:
        """What to do in the place of the call; raises what the call shall raise."""
        return lambda: self.real[call.name](*call.arguments)

    def done(self, call: Call, result: Any) -> None:
        """A call has succeeded."""

    def _below(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        text = os.path.abspath(os.fspath(path))
        if text == self.root:
            return ""
        return text[len(self.root) + 1 :] if text.startswith(self.root + "/") else None

    def _by_path(self, name: str) -> Callable[..., Any]:
        real = self.real[name]
        num_paths = 2 if name in ("rename", "link") else 1

        def call(*args: Any, **kwargs: Any) -> Any:
            paths = tuple(self._below(path) for path in args[:num_paths]) or (None,)
            if any(path is None for path in paths):
                return real(*args, **kwargs)
            with self.lock:
                seen = Call(name, tuple(str(path) for path in paths), args)
                result = self.rule(seen)() if not kwargs else self._with_keywords(seen, kwargs)
                if name == "open":
                    self.open_paths[result] = seen.paths[0]
                    seen = dataclasses.replace(seen, descriptor=result)
                self.done(seen, result)
                return result

        return call

    def _with_keywords(self, seen: Call, kwargs: dict[str, Any]) -> Any:
        self.rule(seen)  # for what it refuses; none of ours uses keywords but pathlib's stat(follow_symlinks=True)
        return self.real[seen.name](*seen.arguments, **kwargs)

    def _by_descriptor(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(descriptor: int, *args: Any) -> Any:
            with self.lock:
                path = self.open_paths.get(descriptor)
                if path is None:
                    try:
                        return real(descriptor, *args)
                    except OSError as error:
                        if name == "close" and error.errno == errno.EBADF:
                            self.double_closes.append(descriptor)
                        raise
                seen = Call(name, (path,), (descriptor, *args), descriptor)
                try:
                    result = self.rule(seen)()
                finally:
                    if name == "close":  # whatever close says, Linux has let the descriptor go
                        self.open_paths.pop(descriptor, None)
                self.done(seen, result)
                return result

        return call
