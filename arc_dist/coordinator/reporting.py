"""Reports a durable shard, and waits for what becomes of its step, also when the coordinator is replaced meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from arc_dist.coordinator.client import Methods
from arc_dist.errors import CoordinatorUnavailable

_POLL_S = 30.0
_RETRY_S = 0.5


def report_shard(
    client: Methods, shard: Mapping[str, Any], timeout_s: float, stopping: threading.Event
) -> dict[str, Any]:
    """Returns the coordinator's last answer, which may be that the save is pending still.

    A coordinator that was restarted has forgotten the shards of saves that it had not committed; each rank tells it of
    its own again. A report is idempotent.

    Args:
        client: the coordinator's.
        shard: the arguments of `Methods.shard`.
        timeout_s: how long to wait, for the other ranks and for the coordinator.
        stopping: ends the wait.

    Raises:
        CoordinatorUnavailable: it was not reached for all of that time.
        Fenced, ConfigError: it refuses the shard.
    """
    deadline = time.monotonic() + timeout_s
    lost_at: float | None = None
    told: int | None = None  # the epoch of the coordinator that knows of the shard
    while True:
        try:
            if told is None:
                answer = client.shard(**shard)
                told = answer["epoch"]
            else:
                answer = client.commit_status(
                    step=shard["step"], generation=shard["generation"], timeout_s=_POLL_S, tier=shard["tier"]
                )
        except CoordinatorUnavailable:
            told, now = None, time.monotonic()
            lost_at = now if lost_at is None else lost_at
            if now - lost_at >= client.patience_s or now >= deadline or stopping.wait(_RETRY_S):
                raise
            continue
        lost_at = None
        if answer["epoch"] != told:
            told = None
        elif answer["status"] != "pending" or stopping.is_set():
            return answer
        if time.monotonic() >= deadline:
            return answer
