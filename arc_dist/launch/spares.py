"""What arcrun arranges with torchrun for a job in which a node may be lost and the others go on."""

from __future__ import annotations

import functools
import os
import sys

_EXIT_BARRIER_S = 15.0  # all supervisors of a job end within a few seconds of each other


def prepare(*, max_nodes: int) -> None:
    """Call it before torchrun's agent is made."""
    from torch.distributed.launcher import api

    if max_nodes == 1:
        print(
            "arcrun: spares on a single node replace nobody: torchrun's agent ends all workers of its node when one "
            "supervisor is lost. Start them as nodes of their own (--nnodes, docs/spares.md).",
            file=sys.stderr,
        )
    # An agent that succeeded waits for all others, five minutes (torch 2.13), also for those of nodes that are lost.
    api.LocalElasticAgent = functools.partial(api.LocalElasticAgent, exit_barrier_timeout=_EXIT_BARRIER_S)
    # A node that comes back joins later than the others: see `arcrun._may_change_size`.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
