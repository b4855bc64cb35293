"""What the launcher said about this rank. Standard library only: bad settings are reported before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from arc_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """What the launcher said about this rank.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        local_rank: number of this rank on its host.
        local_world_size: number of ranks on its host, as far as that is known.
        num_launchers: how many launchers (torchrun's agents, one per node) have started ranks of this world.
        run_id: the launcher's name of the job, or None when it has none.
        restart_count: how often torchrun's agent has restarted its workers.
        max_restarts: how often it may.
        store_host: where the launcher's store is or is to be; None with a world of one and no launcher.
        store_port: its port.
        has_agent_store: the launcher's agent serves that store, so that rank 0 need not.
        node: number of this rank's node among those of the launcher.
        has_agents: the launcher has an agent on every node, which starts all its ranks again when one is lost.
        shrinks: how often the world has become smaller since the launcher made it.
        spares: how many of the launcher's workers are no ranks, but stand by: those with the highest numbers.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_launchers: int = 1
    run_id: str | None = None
    restart_count: int = 0
    max_restarts: int = 0
    store_host: str | None = None
    store_port: int = 0
    has_agent_store: bool = False
    node: int = 0
    has_agents: bool = False
    shrinks: int = 0
    spares: int = 0

    @property
    def is_spare(self) -> bool:
        """Whether this worker has no rank. `rank` is then its number among the launcher's workers."""
        return self.rank >= self.world_size

    @property
    def num_workers(self) -> int:
        """How many workers the launcher started."""
        return self.world_size + self.spares

    def taking(self, rank: int) -> Membership:
        """This spare in the place of `rank`; it keeps its `local_rank`, and with it its device."""
        return dataclasses.replace(self, rank=rank)

    @staticmethod
    def read(environ: Mapping[str, str], *, spares: int = 0) -> Membership:
        """Reads the variables that torchrun and its like set.

        Args:
            environ: the process environment.
            spares: see the attribute.

        Raises:
            ConfigError: they contradict each other or are not numbers.
        """
        rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"RANK={rank} does not fit WORLD_SIZE={world_size}. Start with torchrun or arcrun, or set both."
            )
        if spares >= world_size:
            raise ConfigError(
                f"{spares} of the {world_size} workers are to be spares (ARC_SPARES, arcrun --arc-spares), and none "
                f"is left to train. Spares are counted among the launcher's workers (nodes x --nproc-per-node): start "
                f"more workers, or have fewer spares.",
                spares=spares,
            )
        host = environ.get("MASTER_ADDR") or None
        if host is None and world_size > 1:
            raise ConfigError(
                f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set. Start with torchrun or arcrun, or set "
                f"MASTER_ADDR and MASTER_PORT."
            )
        run_id = environ.get("TORCHELASTIC_RUN_ID")
        return Membership(
            rank=rank,
            world_size=world_size - spares,
            spares=spares,
            local_rank=_number(environ, "LOCAL_RANK", 0),
            local_world_size=max(1, _number(environ, "LOCAL_WORLD_SIZE", 1)),
            num_launchers=_number(environ, "GROUP_WORLD_SIZE", 1),
            run_id=run_id if run_id not in ("", "none") else None,
            restart_count=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
            max_restarts=_number(environ, "TORCHELASTIC_MAX_RESTARTS", 0),
            store_host=host,
            store_port=_number(environ, "MASTER_PORT", 0) if host is not None else 0,
            has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            node=_number(environ, "GROUP_RANK", 0),
            has_agents=run_id is not None,
        )

    def among(self, survivors: Sequence[tuple[int, int]]) -> Membership:
        """This rank in the smaller world of `survivors`, (rank, node) of each by rank; it is one of them."""
        ranks = [rank for rank, _ in survivors]
        nodes = sorted({node for _, node in survivors})
        return dataclasses.replace(
            self,
            rank=ranks.index(self.rank),
            world_size=len(ranks),
            spares=0,
            num_launchers=len(nodes),
            node=nodes.index(self.node),
            shrinks=self.shrinks + 1,
        )

    @property
    def environ(self) -> dict[str, str]:
        """What the launcher would have said of this world, where it said something else."""
        if not (self.shrinks or self.spares):
            return {}
        rank, world_size = str(self.rank), str(self.world_size)
        said = {"RANK": rank, "WORLD_SIZE": world_size, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": world_size}
        if self.shrinks:
            said |= {"GROUP_RANK": str(self.node), "GROUP_WORLD_SIZE": str(self.num_launchers)}
        return said


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number. Correct or unset it.", variable=name) from None
