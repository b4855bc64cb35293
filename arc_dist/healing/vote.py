"""The vote: one int64 per step, combined by bitwise OR over all ranks.

The vote has a gloo group of its own, so that it works for CPU and GPU jobs alike, never queues behind the job's
gradients, and has its own deadline. It is begun without blocking and waited for before the update it guards.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from arc_dist import errors
from arc_dist.errors import ArcError, ConfigError, PeerLost
from arc_dist.protocol import replicas
from arc_dist.protocol.flags import Flag


def distributed_world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Voter:
    """Votes and rare exchanges between all ranks.

    Args:
        timeout_s: how long a rank waits for the others in one exchange, in seconds.

    Every rank must construct it, and call each method, in the same order: all but `begin` block.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self.rank, self.world_size = distributed_world()
        self._ballot = 0
        self._work: dist.Work | None = None
        self.differs = False  # the replicas' digests of the last vote that carried them were not equal
        self._word = torch.zeros(1, dtype=torch.int64)
        self._words = self._word  # of the vote at hand; three when it carries a digest
        self._mean_work: dist.Work | None = None
        self._mean = torch.zeros(2, dtype=torch.float64)
        self._group: dist.ProcessGroup | None = None
        if self.world_size > 1:
            # The store work of making a group costs a few round trips once.
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def begin(self, ballot: Flag | int, digest: int | None = None) -> None:
        """Hands in this rank's ballot; does not block.

        Args:
            ballot: this rank's flags.
            digest: of this rank's replica, to be compared with the others'; on all ranks or on none.
        """
        self._ballot = int(ballot)
        self._words = self._word
        self.differs = False
        if self._group is not None:
            if digest is None:
                self._word.fill_(self._ballot)
            else:
                self._words = torch.tensor([self._ballot, *replicas.ballot(digest)])
            self._work = dist.all_reduce(self._words, op=dist.ReduceOp.BOR, group=self._group, async_op=True)

    def result(self, step: int) -> int:
        """The OR of all ballots as a plain integer. Blocks until every rank has handed in its own.

        Raises:
            PeerLost: a rank did not vote: it died, hangs, or runs other code.
        """
        if self._work is None:
            return self._ballot
        work, self._work = self._work, None
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost("the vote", step, error) from error
        if self._words is self._word:
            return int(self._word.item())
        merged, any_set, any_clear = self._words.tolist()
        self.differs = not replicas.all_equal(any_set, any_clear)
        return merged

    def begin_mean(self, total: float, count: int) -> None:
        """Begins the mean over all ranks of `count` values that sum to `total`; does not block."""
        self._mean[0] = total
        self._mean[1] = count
        if self._group is not None:
            self._mean_work = dist.all_reduce(self._mean, group=self._group, async_op=True)

    def mean(self, step: int) -> float | None:
        """The mean begun last, or None when no rank had a value."""
        if self._mean_work is not None:
            work, self._mean_work = self._mean_work, None
            try:
                work.wait()
            except RuntimeError as error:
                raise self._lost("the mean loss", step, error) from error
        total, count = self._mean.tolist()
        return total / count if count else None

    def gather(self, item: Any, step: int) -> list[Any]:
        """Every rank's JSON-able `item`, in rank order, on every rank. Rare: for details once a flag is up."""
        if self._group is None:
            return [json.loads(json.dumps(item))]
        data = json.dumps(item).encode()
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
            dist.all_gather(parts, padded, group=self._group)
        except RuntimeError as error:
            raise self._lost("an exchange of details", step, error) from error
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(parts, sizes, strict=True)]

    def maximum(self, value: float, step: int) -> float:
        """The largest `value` over all ranks."""
        return max(self.gather(value, step))

    def close(self) -> None:
        """Forgets the group. Does not communicate."""
        self._group = None
        self._work = None
        self._mean_work = None

    def _lost(self, what: str, step: int, error: RuntimeError) -> PeerLost:
        return PeerLost(
            f"rank {self.rank} of {self.world_size}: {what} of step {step} did not complete: "
            f"{str(error).splitlines()[0]}. A peer died, hangs, or runs other code; under arcrun the job restarts "
            "by itself.",
            rank=self.rank,
            step=step,
        )


def agree(voter: Voter, action: Callable[[], Any], what: str) -> Any:
    """Runs `action` on every rank; when it fails on one, every rank raises that rank's error. Blocks.

    Raises:
        ArcError: of the kind that the first failing rank met.
    """
    result, mine = None, None
    try:
        result = action()
    except ArcError as error:
        mine = error
    reports = voter.gather(None if mine is None else [type(mine).__name__, mine.message], step=0)
    for rank, report in enumerate(reports):
        if report is not None:
            if mine is not None:
                raise mine
            kind, message = report
            raise getattr(errors, kind)(f"{what} on rank {rank}: {message}", rank=rank)
    return result


def require_equal_settings(voter: Voter, settings: dict[str, Any]) -> None:
    """Stops all ranks when their settings differ, naming the ranks and the settings. Every rank must call this.

    Raises:
        ConfigError: on every rank alike.
    """
    everyone = voter.gather(settings, step=0)
    differing = [
        f"{name}: " + ", ".join(f"rank {rank} has {theirs.get(name)!r}" for rank, theirs in enumerate(everyone))
        for name in sorted(set().union(*everyone))
        if len({json.dumps(theirs.get(name), sort_keys=True) for theirs in everyone}) > 1
    ]
    if differing:
        raise ConfigError(
            "ranks were given different settings: " + "; ".join(differing) + ". Give all ranks the same.",
            rank=voter.rank,
        )
