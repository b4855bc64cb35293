"""From what a supervisor was told to what hosts, addresses and clients of the coordinator need."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from arc_dist.config import Env, default_run_dir
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.following import FollowingClient
from arc_dist.coordinator.hosting import HostSpec
from arc_dist.supervisor import process
from arc_dist.supervisor.membership import Membership
from arc_dist.supervisor.ray_host import node_file
from arc_dist.supervisor.rendezvous import CoordinatorAddress


def spec_of(env: Env, membership: Membership) -> tuple[HostSpec, Path]:
    """What the coordinator's host is told, and the run directory as the user named it."""
    job_id = _job_id(env, membership)
    run_dir = env.run_dir if env.run_dir_named else default_run_dir(job_id)
    spec = HostSpec(
        job_id=job_id,
        run_dir=str(run_dir.absolute()),
        world_size=membership.world_size,
        start=secrets.token_hex(16),
        token=secrets.token_urlsafe(32),
        max_restarts=env.max_restarts,
        host_timeout_s=env.host_timeout_s,
        min_nodes=env.min_nodes,
        expects_all=membership.shrinks > 0,
        is_replaceable=not membership.has_agents,
        spare_after_s=env.spare_after_s,
        evicts=env.evict,
        tls_cert=None if env.tls_cert is None else str(env.tls_cert.absolute()),
        tls_key=None if env.tls_key is None else str(env.tls_key.absolute()),
    )
    return spec, run_dir


def address_of(found: Endpoint) -> CoordinatorAddress:
    """What rank 0 announces of a coordinator that can move."""
    return CoordinatorAddress(
        url=found.url, token=found.token, job_id=found.job_id, run_dir=found.run_dir, epoch=found.epoch
    )


def endpoint_of(env: Env, address: CoordinatorAddress) -> Endpoint:
    """What an announcement says, for who follows it."""
    return Endpoint(
        url=address.url,
        token=address.token,
        job_id=address.job_id,
        run_dir=address.run_dir,
        world_size=env.world_size,
        host="",
        pid=0,
        authority=None if env.tls_ca is None else str(env.tls_ca.absolute()),
        epoch=address.epoch,
    )


def follower_of(env: Env, address: CoordinatorAddress, timeout_s: float) -> FollowingClient:
    """A client that goes where this node is told that the coordinator has gone."""
    return FollowingClient(endpoint_of(env, address), node_file(Path(address.run_dir)), timeout_s)


def _job_id(env: Env, membership: Membership) -> str:
    """The launcher's name of the job, or one that no other job has: its journal must not be taken for ours.

    torchrun's agent outlives its restarts of the supervisors, which are to find the journal again; so where there is
    an agent, it is what names a job without a name.
    """
    if env.job_named:
        return env.job_id
    if membership.run_id is not None:
        return membership.run_id
    pid = os.getppid() if membership.has_agents else os.getpid()
    return f"job-{pid}-{process.start_ticks(pid) or 0}"
