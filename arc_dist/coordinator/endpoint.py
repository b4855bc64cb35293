"""How people find the coordinator of a running job: a small file with its address and token, for its owner alone.

It lies in rank 0's directory in shared memory, where all jobs of a host are found and which goes with its supervisor,
and in the run directory, whose name people know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any, cast

from arc_dist.errors import ConfigError

NAME = "coordinator.json"
_MAX_BYTES = 65_536
_SHM_PREFIX = "arc-dist-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a coordinator is.

    Attributes:
        url: its address.
        token: what it wants to see.
        job_id: the job's name.
        run_dir: where its incidents and its journal are.
        world_size: number of ranks.
        host: identity of the host it runs on, for people.
        pid: of the process that it runs in, there.
        authority: the PEM file that vouches for its certificate; None for the system's, or plain HTTP.
        epoch: of the coordinator; a higher one is a later one, and 0 is not known.
    """

    url: str
    token: str = dataclasses.field(repr=False)
    job_id: str
    run_dir: str
    world_size: int
    host: str
    pid: int
    authority: str | None = None
    epoch: int = 0

    def write(self, directory: Path, name: str = NAME) -> Path:
        """Writes the file, whole and readable by this user only.

        Raises:
            ConfigError: it cannot be written there.
        """
        path = directory / name
        draft = path.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self), file)
            draft.rename(path)
        except OSError as error:
            raise ConfigError(
                f"the coordinator's address cannot be written to {path}: {error}. Set ARC_RUN_DIR to a directory that "
                f"can be written.",
            ) from error
        return path

    def remove(self, path: Path) -> None:
        """Removes the file, unless a later coordinator has put its own there."""
        with contextlib.suppress(OSError, ConfigError):  # gone already, or no longer ours
            if read(path) == self:
                path.unlink()


def read(path: Path) -> Endpoint:
    """The endpoint in a file.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is not one, or another user may have written it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid not in (os.getuid(), 0) or about.st_mode & 0o022:
            raise ConfigError(f"{path} can be written by other users, so it is not believed")
        text = file.read(_MAX_BYTES)
    try:
        fields: object = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError("no object")
        known = {field.name for field in dataclasses.fields(Endpoint)}
        kept = {name: value for name, value in cast("dict[str, Any]", fields).items() if name in known}
        if not all(isinstance(kept.get(name), str) for name in ("url", "token", "job_id", "run_dir", "host")):
            raise TypeError("a field is missing or no text")
        if not isinstance(kept.get("epoch", 0), int):
            raise TypeError("the epoch is no number")
        return Endpoint(**kept)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} does not tell where a coordinator is: {error}") from None


def running(shm_root: Path) -> list[Endpoint]:
    """The coordinators of this user's jobs that have one on this host, by name."""
    found: list[Endpoint] = []
    for path in sorted(shm_root.glob(f"{_SHM_PREFIX}{os.getuid()}-*/{NAME}")):
        with contextlib.suppress(OSError, ConfigError):  # a job that ends in this moment, or no file of ours
            found.append(read(path))
    return sorted(found, key=lambda endpoint: endpoint.job_id)
