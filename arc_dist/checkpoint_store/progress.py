"""Says how far something long is, to people at a terminal and in a log."""

from __future__ import annotations

import sys
import threading
import time

_TERMINAL_EVERY_S = 0.5
_LOG_AFTER_S = 10.0
_LOG_EVERY_S = 30.0


class Progress:
    """Says on stderr how far something is; called from several threads.

    On a terminal it is one line that is rewritten. Elsewhere (a log file) nothing is said about what is quick, and a
    line every half minute about what is slow.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._shown = False
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + (0.0 if self._terminal else _LOG_AFTER_S)
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + (_TERMINAL_EVERY_S if self._terminal else _LOG_EVERY_S)
            rate = format_bytes(int(self._done / max(now - self._began, 1e-3)))
            share = format_bytes(self._done)
            if self._total is not None:
                share = f"{min(100 * self._done // max(self._total, 1), 100):3d} %"
            text = f"{clean(self._label)}: {share}, {rate}/s"
            self._shown = True
            sys.stderr.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._terminal and self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def format_bytes(nbytes: int) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def clean(text: str) -> str:
    """Names come from files: what could steer a terminal is shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
