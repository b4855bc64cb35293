"""What a supervisor needs around it: shared memory, the coordinator (rank 0 hosts it), the stores, the signals."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from arc_dist.config import Env, default_run_dir
from arc_dist.coordinator.client import CoordinatorClient, LocalClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.tls import Certificate
from arc_dist.errors import ConfigError, CoordinatorUnavailable, ExitCode
from arc_dist.preemption.file import NoticeFile, seconds_since_1970
from arc_dist.snapshot.directory import OwnedDirectory
from arc_dist.supervisor import process, zygote
from arc_dist.supervisor.events import Event, Events, Noticed, Signalled
from arc_dist.supervisor.membership import Membership
from arc_dist.supervisor.rendezvous import (
    CoordinatorAddress,
    GenerationStores,
    Meeting,
    advertised_host,
    host_identity,
)
from arc_dist.supervisor.reporter import StepReporter
from arc_dist.supervisor.spare import stand_by
from arc_dist.supervisor.supervisor import Client, Ending, Setup, Supervisor
from arc_dist.telemetry.log import set_up_logging

_JOIN_LIMIT_S = 600.0  # ranks of a large job may take minutes to import torch from a shared file system
_JOIN_RETRY_S = 0.05
_ANNOUNCEMENT_GRACE_S = 2.0
_CLIENT_TIMEOUT_S = 5.0
_FAREWELL_LIMIT_S = 5.0
_MEMBERSHIP_SIGNAL_LIMIT_S = 10.0  # agents look for new nodes every 0.1 s, and hear of them up to a second late


def supervise(
    env: Env, membership: Membership, zygote_process: zygote.ZygoteProcess, *, is_guarded: bool = True
) -> Ending:
    """Runs this rank's supervisor to its end. Call it from the main thread, after the zygote was forked.

    Args:
        env: settings.
        membership: what the launcher said about this rank.
        zygote_process: forks the trainers.
        is_guarded: see `Setup`.

    Raises:
        ArcError: the job cannot start or go on; the message is for the user.
    """
    set_up_logging(level=env.log_level, rank=membership.rank, world_size=membership.world_size)
    if env.log_level != "debug":
        # The supervisors of the ranks concerned say the same, with times.
        logging.getLogger("arc_dist.coordinator").setLevel(logging.WARNING)
    process.adopt_orphans()
    with contextlib.ExitStack() as stack:
        directory = _own_directory(env.shm_root, f"{env.job_id}-r{membership.rank}")
        stack.callback(directory.close)
        meeting = Meeting(membership) if membership.store_host is not None else None
        if membership.is_spare:
            assert meeting is not None  # as for a rank above 0
            outcome = stand_by(env, membership, meeting, directory.path)
            if isinstance(outcome, Ending):
                return outcome
            membership = outcome
            set_up_logging(level=env.log_level, rank=membership.rank, world_size=membership.world_size)
        if membership.rank == 0:
            address, client, server = _host_coordinator(stack, env, membership, directory.path)
            if meeting is not None:
                meeting.announce(address)
            answer = _join(client, membership, str(directory.path))
        else:
            assert meeting is not None  # Membership.read refuses a rank above 0 without one
            server = None
            address, client, answer = _find_coordinator(env, membership, meeting, str(directory.path))
        stores = None
        if membership.rank == 0 and membership.store_host is not None:
            stores = GenerationStores(advertised_host(membership)[0])
        events: Events[Event] = queue.SimpleQueue()
        stack.enter_context(_signals_as_events(events))
        setup = Setup(
            rank=membership.rank,
            host=host_identity(),
            shm_dir=directory.path,
            environ={
                **membership.environ,
                "ARC_COORDINATOR": address.url,
                "ARC_TOKEN": address.token,
                "ARC_JOB_ID": address.job_id,
                "ARC_RUN_DIR": address.run_dir,
            },
            store_for=stores.prepare if stores is not None else None,
            generation_began=stores.retire if stores is not None else lambda generation: None,
            uses_store=membership.store_host is not None,
            grace_s=env.grace_s,
            preempt_signals=env.preempt_signals,
            is_guarded=is_guarded,
        )
        if env.preempt_file is not None:
            stack.callback(_watch_notice_file(env.preempt_file, membership, events).close)
        supervisor = Supervisor(setup, client, zygote_process, events)
        reporter = StepReporter(membership.rank, membership.world_size, directory.path, client)
        stack.callback(reporter.close)
        try:
            ending = supervisor.run(int(answer["generation"]))
        finally:
            supervisor.close()
            if meeting is not None and server is None:
                meeting.leave(address.token, membership)
            elif meeting is not None and server is not None:
                limit_s = max(_FAREWELL_LIMIT_S, env.grace_s) if supervisor.was_preempted else _FAREWELL_LIMIT_S
                meeting.await_others(address.token, membership, lambda: server.num_connections, timeout_s=limit_s)
        _await_launcher(ending, membership, supervisor)
        return ending


def _await_launcher(ending: Ending, membership: Membership, supervisor: Supervisor) -> None:
    """Lets the own launcher tell this rank to go, when a rank of another launcher was told to.

    When nodes join, every torchrun agent ends its workers, each at a moment of its own. The ranks have agreed to go by
    then, and a worker that is gone before its own agent ended it would be a failed one, which costs the agent one of
    its restarts, or its life.
    """
    if ending.returncode != ExitCode.PREEMPTED or membership.num_launchers == 1 or supervisor.was_signalled:
        return
    supervisor.await_own_signal(_MEMBERSHIP_SIGNAL_LIMIT_S)


def _watch_notice_file(path: Path, membership: Membership, events: Events[Event]) -> NoticeFile:
    # torchrun's agent is as old as the job; without one the job begins here.
    pid = os.getppid() if membership.has_agent_store else os.getpid()
    watch = NoticeFile(
        path,
        job_started_at=seconds_since_1970(process.start_ticks(pid)),
        on_notice=lambda: events.put(Noticed(f"{path} has appeared")),
    )
    watch.start()
    return watch


def _find_coordinator(
    env: Env, membership: Membership, meeting: Meeting, shm_dir: str
) -> tuple[CoordinatorAddress, Client, dict[str, Any]]:
    """Finds the coordinator in rank 0's supervisor and joins it; returns its answer too."""
    deadline = time.monotonic() + _JOIN_LIMIT_S
    problem = "nothing was announced"
    refused: CoordinatorAddress | None = None
    while time.monotonic() < deadline:
        found = meeting.look_up(timeout_s=1.0)
        if found is None:
            continue
        client = CoordinatorClient(found.url, found.token, timeout_s=_CLIENT_TIMEOUT_S, authority=env.tls_ca)
        try:
            return found, client, _join(client, membership, shm_dir)
        except CoordinatorUnavailable as error:
            problem = str(error)  # announced by a rank 0 that is gone; its successor announces itself in a moment
            time.sleep(_JOIN_RETRY_S)
        except ConfigError:
            # The same port may have gone to the new rank 0's coordinator, which refuses the old token.
            if found == refused:
                raise
            refused = found
            time.sleep(_ANNOUNCEMENT_GRACE_S)
    raise CoordinatorUnavailable(
        f"rank {membership.rank}: no coordinator was found for {_JOIN_LIMIT_S:.0f} s: {problem}. "
        f"Look at rank 0's output: its supervisor hosts it.",
        rank=membership.rank,
    )


def _join(client: Any, membership: Membership, shm_dir: str) -> dict[str, Any]:
    return client.join(
        rank=membership.rank,
        world_size=membership.world_size,
        host=host_identity(),
        pid=os.getpid(),
        shm_dir=shm_dir,
    )


def _host_coordinator(
    stack: contextlib.ExitStack, env: Env, membership: Membership, shm_dir: Path
) -> tuple[CoordinatorAddress, LocalClient, CoordinatorServer]:
    job_id = _job_id(env, membership)
    run_dir = env.run_dir if env.run_dir_named else default_run_dir(job_id)
    _, listen = advertised_host(membership)
    certificate = Certificate.of(env.tls_cert, env.tls_key)
    coordinator = Coordinator.open(
        membership.world_size,
        run_dir=run_dir,
        job_id=job_id,
        max_restarts=env.max_restarts,
        spare_after_s=env.spare_after_s,
        evicts=env.evict,
    )
    stack.callback(coordinator.close)
    server = stack.enter_context(CoordinatorServer(coordinator, host=listen, certificate=certificate))
    address = CoordinatorAddress(url=server.address, token=server.token, job_id=job_id, run_dir=str(run_dir))
    endpoint = Endpoint(
        url=server.address,
        token=server.token,
        job_id=job_id,
        run_dir=str(run_dir.absolute()),
        world_size=membership.world_size,
        host=host_identity(),
        pid=os.getpid(),
        authority=None if env.tls_ca is None else str(env.tls_ca.absolute()),
    )
    for directory in (shm_dir, run_dir):  # the first goes with this process whatever ends it; the second is known
        path = endpoint.write(directory)
        stack.callback(endpoint.remove, path)
    return address, LocalClient(coordinator), server


def _job_id(env: Env, membership: Membership) -> str:
    """The launcher's name of the job, or one that no other job has: its journal must not be taken for ours.

    torchrun's agent outlives its restarts of the supervisors, which are to find the journal again; so where there is
    an agent, it is what names a job without a name.
    """
    if env.job_named:
        return env.job_id
    if membership.run_id is not None:
        return membership.run_id
    pid = os.getppid() if membership.has_agent_store else os.getpid()
    return f"job-{pid}-{process.start_ticks(pid) or 0}"


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


@contextlib.contextmanager
def _signals_as_events(events: Events[Event]) -> Iterator[None]:
    """From here on signals are told to the supervisor's loop; one that the caller ignores (nohup) stays ignored."""

    def note(number: int, frame: FrameType | None) -> None:
        events.put(Signalled(number))

    old: dict[int, Any] = {}
    for number in zygote.FORWARDED_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            old[number] = signal.signal(number, note)
    try:
        yield
    finally:
        # The rest of the way out is short; a second signal must not leave the directory in shared memory behind.
        for number in old:
            signal.signal(number, signal.SIG_IGN)
