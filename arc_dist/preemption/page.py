"""The word by which a supervisor tells its trainers to leave: a page in shared memory, read without a system call.

It is there before a trainer's own handlers are, and stays up from one generation to the next, so no notice is lost
while a script starts, restores or is between two lives.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

_NAME = "notice"


class NoticePage:
    """One process raises the word, others read it; nobody takes it down."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._word = memoryview(mapping)[:8].cast("q")

    @classmethod
    def create(cls, directory: Path) -> NoticePage:
        """Creates the page of a rank's directory, with the word down."""
        descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
            return cls(mmap.mmap(descriptor, mmap.PAGESIZE))
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, directory: Path) -> NoticePage:
        """Opens the page of a directory.

        Raises:
            FileNotFoundError: nobody has created it.
        """
        descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, mmap.PAGESIZE))
        finally:
            os.close(descriptor)

    def raise_notice(self) -> None:
        """The job is told to go."""
        self._word[0] = 1

    @property
    def is_raised(self) -> bool:
        return self._word[0] != 0
