"""What arcrun arranges with torchrun for nodes that are lost, and for worlds that change their size."""

from __future__ import annotations

import argparse
import math
import os
import sys

_DEFAULT_PORT = 29400  # torchrun's, of its c10d rendezvous
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
    if arguments.rdzv_backend == "c10d" and int(most) > 1 and host_timeout_s:
        _keep_alive(arguments, host_timeout_s)
    if fewest != most:
        # Else torchrun (2.13) lets ranks meet in a store that it made in its first round; a node that joins later does
        # not know it and waits for another one, for ever.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        if arguments.rdzv_backend == "c10d" and arguments.rdzv_endpoint:
            _let_shrink(arguments, int(fewest))
    return True


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
    endpoint: str = arguments.rdzv_endpoint
    host, colon, port = endpoint.rpartition(":")
    if not (colon and port.isdigit()):
        host, port = endpoint, str(_DEFAULT_PORT)
    os.environ["ARC_MIN_NODES"] = str(min_nodes)
    os.environ["ARC_RENDEZVOUS"] = f"{host}:{port}"
