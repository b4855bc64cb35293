"""torchrun's agent, for jobs that go on without a node that is lost or left out."""

from __future__ import annotations

import time
from pathlib import Path

from arc_dist.launch import endings

_OTHERS_LIMIT_S = 10.0  # all supervisors of a job end within a few seconds of each other
_POLL_S = 0.05


def install(reports: Path) -> None:
    """Makes torchrun use it; call it before torchrun makes its agent.

    Args:
        reports: where the supervisors of this node note how they end.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        """Waits less at the end than torchrun's (2.13), and does not bring back a node that was left out."""

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]  # its decorator has no types
            is_over = result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY)
            if is_over and endings.is_left_out(reports):
                self._remaining_restarts = 0
                # Closing it, as torchrun does after a failure, would forbid the others to meet ever again.
                worker_group.spec.rdzv_handler.shutdown = lambda: True
            return result

        def _exit_barrier(self) -> None:
            """Says nothing: torchrun's waits five minutes for a node that is lost."""
            store, deadline = self._store, time.monotonic() + _OTHERS_LIMIT_S
            num_agents = self._worker_group.group_world_size
            if store is None or num_agents is None:
                return
            try:
                ended = store.add("arc/agents-ended", 1)
                while ended < num_agents and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                    ended = store.add("arc/agents-ended", 0)
            except RuntimeError:
                return  # the agent that served the store has ended, and waited for this one as long as it would

    api.LocalElasticAgent = Agent
