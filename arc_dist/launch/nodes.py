"""What arcrun arranges with torchrun for nodes that are lost, and for worlds that change their size."""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from collections.abc import Callable

from arc_dist.protocol.pulse import AwakeClock
from arc_dist.supervisor.pulse import reaches

_DEFAULT_PORT = 29400  # torchrun's, of its c10d rendezvous
_LEAST_RENDEZVOUS_LIMIT_S = 60.0  # torchrun's own, where it has one
_PROBE_EVERY_S = 1.0
_BEATS = 5  # so many missed ones in a row are no chance


def arrange(arguments: argparse.Namespace, host_timeout_s: float) -> bool:
    """Prepares for nodes that come and go (``--nnodes=min:max``). False when that is no range, which is said.

    Args:
        arguments: torchrun's; its rendezvous is made to notice a lost node in due time.
        host_timeout_s: silence after which the supervisors count a host as lost; 0 for never.
    """
    nnodes: str = arguments.nnodes
    fewest, _, most = nnodes.partition(":")
    most = most or fewest
    if not (fewest.isdigit() and most.isdigit() and 0 < int(fewest) <= int(most)):
        print(f"arcrun: --nnodes={nnodes} is neither a number nor MIN:MAX with 0 < MIN <= MAX.", file=sys.stderr)
        return False
    if arguments.arc_spares and (int(most) == 1 or arguments.standalone):
        print(
            "arcrun: spares on a single node replace nobody: torchrun's agent ends all workers of its node when one "
            "supervisor is lost. Start them as nodes of their own (--nnodes, docs/spares.md).",
            file=sys.stderr,
        )
    if arguments.rdzv_backend == "c10d" and int(most) > 1 and host_timeout_s:
        _keep_alive(arguments, host_timeout_s)
    if int(most) > 1:
        # Else torchrun (2.13) lets ranks meet in a store that it made in its first round; a node that joins later, or
        # takes the place of a lost one, does not know it and waits for another one, for ever.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if fewest != most and arguments.rdzv_backend == "c10d" and arguments.rdzv_endpoint:
        _let_shrink(arguments, int(fewest))
    return True


def watch_rendezvous(arguments: argparse.Namespace, host_timeout_s: float, end: Callable[[str], None]) -> None:
    """Starts a thread that calls `end`, with the reason, when the rendezvous was in reach and is not any more.

    torchrun's agent (2.13) asks the rendezvous without a time-out. When its host is gone without a word, the agent
    waits until TCP gives up, which takes a quarter of an hour, long after its workers have ended.
    """
    if arguments.rdzv_backend != "c10d" or not arguments.rdzv_endpoint or not host_timeout_s:
        return
    limit_s = max(_LEAST_RENDEZVOUS_LIMIT_S, 2 * host_timeout_s)
    endpoint = _address(arguments.rdzv_endpoint)

    def watch() -> None:
        clock = AwakeClock(limit_s)
        reached_s: float | None = None
        while True:
            is_reached = reaches(endpoint)
            now_s = clock.look(time.monotonic())
            if is_reached:
                reached_s = now_s
            elif reached_s is not None and now_s - reached_s > limit_s:
                end(f"the rendezvous at {endpoint} has been out of reach for {now_s - reached_s:.0f} s")
                return
            time.sleep(_PROBE_EVERY_S)

    threading.Thread(target=watch, name="arc-rendezvous", daemon=True).start()


def _keep_alive(arguments: argparse.Namespace, host_timeout_s: float) -> None:
    """Lets the rendezvous leave a node out soon after the node itself has ended its training processes, never before.

    A node that is cut off ends them after `host_timeout_s`. Its last beat was up to an interval earlier, and it takes
    a moment to end them, for which there is another interval.
    """
    if "keep_alive" in (arguments.rdzv_conf or ""):
        return
    interval_s = max(1, math.ceil(host_timeout_s / _BEATS))
    attempts = math.ceil(host_timeout_s / interval_s) + 2
    ours = f"keep_alive_interval={interval_s},keep_alive_max_attempt={attempts}"
    arguments.rdzv_conf = ",".join(filter(None, (arguments.rdzv_conf, ours)))


def _let_shrink(arguments: argparse.Namespace, min_nodes: int) -> None:
    """Tells the supervisors what they need to go on with fewer nodes by themselves: see `arc_dist.protocol.pulse`."""
    os.environ["ARC_MIN_NODES"] = str(min_nodes)
    os.environ["ARC_RENDEZVOUS"] = _address(arguments.rdzv_endpoint)


def _address(endpoint: str) -> str:
    """With the port that torchrun takes when there is none."""
    _, colon, port = endpoint.rpartition(":")
    return endpoint if colon and port.isdigit() else f"{endpoint}:{_DEFAULT_PORT}"
