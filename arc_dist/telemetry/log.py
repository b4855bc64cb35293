"""The package's logger: one line per fact, on stderr, prefixed with ``[arc]`` and the rank."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("arc_dist")

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment, so that redirection and pytest's capture work."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def set_up_logging(*, level: str, rank: int, world_size: int) -> None:
    """Gives the package's logger a handler, unless the application configured one.

    Informational lines are printed by rank 0 alone; warnings and errors by every rank.
    """
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = _StderrHandler()
    who = f" rank {rank}" if world_size > 1 else ""
    handler.setFormatter(logging.Formatter(f"[arc{who}] %(message)s"))
    if rank != 0:
        handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(_LEVELS.get(level, logging.INFO))
    logger.propagate = False
