"""A supervisor without a rank: it waits, with everything imported, until it gets the rank of one that is lost."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from arc_dist.config import Env
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.following import PATIENCE_S
from arc_dist.errors import ConfigError, CoordinatorUnavailable
from arc_dist.supervisor.events import LONG_POLL_S
from arc_dist.supervisor.membership import Membership
from arc_dist.supervisor.rendezvous import CoordinatorAddress, Meeting, host_identity
from arc_dist.supervisor.roles import Ending
from arc_dist.telemetry.log import logger

_START_LIMIT_S = 600.0  # for rank 0 to come
_LOST_LIMIT_S = 10.0  # as for a supervisor that has a rank
_RETRY_S = 0.2
_TIMEOUT_S = 5.0


def stand_by(env: Env, membership: Membership, meeting: Meeting, shm_dir: Path) -> Membership | Ending:
    """Waits until this spare gets a rank, or the job is over. Signals still end the process at once meanwhile.

    Returns:
        What the launcher would have said to a worker of the rank that is this spare's now; or how the job ended.

    Raises:
        CoordinatorUnavailable: rank 0 never came, or is gone.
        ConfigError: the coordinator refuses this spare.
    """
    logger.info("worker %d stands by as a spare", membership.rank)
    heard_at, limit_s, found = time.monotonic(), _START_LIMIT_S, None
    problem: Exception | str = "nothing was announced"
    while time.monotonic() - heard_at < limit_s:
        try:
            found = meeting.look_up(timeout_s=1.0) or found
            if found is None:
                continue
            answer = _ask(env, found, shm_dir)
        except (CoordinatorUnavailable, ConfigError, RuntimeError) as error:
            # A rank 0 that is gone may have announced it; an old token is refused by who has its port now. What torch's
            # stores raise is a RuntimeError: rank 0's supervisor may serve that store, too.
            problem = error
            time.sleep(_RETRY_S)
            continue
        heard_at, limit_s = time.monotonic(), PATIENCE_S if found.can_move else _LOST_LIMIT_S
        if answer["kind"] == "take":
            return membership.taking(int(answer["rank"]))
        if answer["kind"] in ("done", "stop"):
            meeting.leave(found.token, membership)
            return Ending(int(answer.get("exit_code", 0)))
    raise CoordinatorUnavailable(
        f"the spare {membership.rank} has not reached the coordinator for {limit_s:.0f} s: {problem}. It lives in rank "
        f"0's supervisor, which no spare can replace: the launcher must restart the job (torchrun --max-restarts)."
    )


def _ask(env: Env, found: CoordinatorAddress, shm_dir: Path) -> dict[str, Any]:
    client = CoordinatorClient(found.url, found.token, timeout_s=_TIMEOUT_S, authority=env.tls_ca)
    try:
        return client.stand_by(host=host_identity(), pid=os.getpid(), shm_dir=str(shm_dir), timeout_s=LONG_POLL_S)
    finally:
        client.close()
