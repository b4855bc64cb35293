"""A supervisor's directory in shared memory, from taking over an earlier life's to leaving it to the next one."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from arc_dist.config import Env
from arc_dist.errors import ArcError, ConfigError, ExitCode
from arc_dist.peers.adoption import Place, adopt
from arc_dist.peers.shelf import Shelf
from arc_dist.snapshot.directory import OwnedDirectory
from arc_dist.snapshot.inheritance import Signature
from arc_dist.supervisor import process
from arc_dist.supervisor.membership import Membership
from arc_dist.telemetry.log import logger

# After these nobody goes on from memory: the job is done, its state is saved, or trying again would be wrong.
_FINAL = frozenset({ExitCode.SUCCESS, ExitCode.PREEMPTED, ExitCode.NO_PROGRESS, ExitCode.CONFIGURATION})


class Estate:
    """Use it in a `with` statement around all of the supervisor's life.

    Raises:
        ConfigError: no directory can be made.
    """

    def __init__(self, env: Env, membership: Membership) -> None:
        self._root = env.shm_root
        self._membership = membership
        self._directory = _own_directory(env.shm_root, f"{env.job_id}-r{membership.rank}")
        self._is_left = False

    @property
    def path(self) -> Path:
        """This rank's directory."""
        return self._directory.path

    def claim(self, lineage: str, member: Membership) -> None:
        """Signs the directory with the job's lineage, and takes over what an earlier life of the job left here.

        Args:
            lineage: of the job.
            member: the rank that it is for, which a spare learns late.
        """
        agent = os.getppid() if member.has_agents else 0
        signature = Signature(
            lineage=lineage,
            rank=member.rank,
            world_size=member.world_size,
            agent_pid=agent,
            agent_ticks=(process.start_ticks(agent) or 0) if agent else 0,
        )
        signature.write(self.path)
        place = Place(local_rank=member.local_rank, local_world_size=member.local_world_size)
        taken = adopt(self._root, self.path, Shelf(self.path), signature, place)
        if taken:
            logger.info("took over what memory still held of rank%s %s", "s" * (len(taken) > 1), _words(taken))

    def ends_with(self, returncode: int, *, was_told: bool, has_run: bool = True) -> None:
        """Decides what becomes of the directory: it stays for a launcher that is about to start the ranks again.

        Args:
            returncode: the supervisor's.
            was_told: a signal of the launcher's ended it.
            has_run: a trainer ran in its time. Without one, being preempted has saved nothing of what was taken over.
        """
        member = self._membership
        has_restarts = member.restart_count < member.max_restarts
        is_untouched = returncode == ExitCode.PREEMPTED and not has_run
        is_awaited = was_told or returncode < 0 or has_restarts or is_untouched
        self._is_left = member.has_agents and is_awaited and (returncode not in _FINAL or is_untouched)

    def __enter__(self) -> Estate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ArcError):
            self.ends_with(int(error.exit_code), was_told=False)
        self._directory.close(keep=self._is_left)


def _words(ranks: list[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _own_directory(root: Path, label: str) -> OwnedDirectory:
    if not root.is_dir():
        raise ConfigError(
            f"{root} shall hold snapshots but is no directory. Set ARC_SHM_ROOT to one, such as /dev/shm."
        )
    try:
        return OwnedDirectory(root, label)
    except OSError as error:
        raise ConfigError(
            f"no directory for snapshots can be made in {root}: {error}. Set ARC_SHM_ROOT to a writable directory."
        ) from error
