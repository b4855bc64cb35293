"""What a supervisor needs around it: shared memory, the coordinator (rank 0 hosts it), the stores, the signals."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from arc_dist.config import Env
from arc_dist.coordinator.client import CoordinatorClient, LocalClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.following import PATIENCE_S, FollowingClient
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ConfigError, CoordinatorUnavailable, ExitCode
from arc_dist.preemption.file import NoticeFile, seconds_since_1970
from arc_dist.supervisor import process, zygote
from arc_dist.supervisor.copies import open_peers
from arc_dist.supervisor.estate import Estate
from arc_dist.supervisor.events import Event, Events, Noticed, Signalled, ZygoteLost, ZygoteSaid
from arc_dist.supervisor.membership import Membership
from arc_dist.supervisor.pulse import Pulse, RendezvousLease
from arc_dist.supervisor.ray_host import Place, RayHost, node_file
from arc_dist.supervisor.rendezvous import (
    CoordinatorAddress,
    GenerationStores,
    Meeting,
    advertised_host,
    host_identity,
)
from arc_dist.supervisor.reporter import StepReporter
from arc_dist.supervisor.roles import Client, Ending, Setup
from arc_dist.supervisor.spare import stand_by
from arc_dist.supervisor.supervisor import Supervisor
from arc_dist.supervisor.trainers import Trainers
from arc_dist.supervisor.whereabouts import address_of, endpoint_of, follower_of, spec_of
from arc_dist.telemetry.log import set_up_logging

_JOIN_LIMIT_S = 600.0  # ranks of a large job may take minutes to import torch from a shared file system
_REJOIN_LIMIT_S = 60.0  # in a smaller world, whose supervisors run already
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
    process.adopt_orphans()
    with contextlib.ExitStack() as stack:
        meeting = Meeting(membership) if membership.store_host is not None else None
        stores = None
        if membership.rank == 0 and membership.store_host is not None:
            stores = GenerationStores(advertised_host(membership)[0])
        events: Events[Event] = queue.SimpleQueue()
        trainers: Trainers | None = None
        while True:
            set_up_logging(level=env.log_level, rank=membership.rank, world_size=membership.world_size)
            if env.log_level != "debug":
                # The supervisors of the ranks concerned say the same, with times.
                logging.getLogger("arc_dist.coordinator").setLevel(logging.WARNING)
            with _World(env, membership, meeting) as world:
                if world.ended is not None:
                    return world.ended
                membership = world.membership
                if trainers is None:
                    trainers = Trainers(membership.rank, world.shm_dir, zygote_process, events)
                    stack.enter_context(_signals_as_events(events))
                    if env.preempt_file is not None:
                        stack.callback(_watch_notice_file(env.preempt_file, membership, events).close)
                else:
                    _forget_old_world(events)
                    trainers.move(membership.rank, world.shm_dir)
                ending = world.run(trainers, events, stores, is_guarded=is_guarded)
            if not ending.survivors:
                return ending
            membership = membership.among(ending.survivors)


class _World:
    """One world of ranks, as long as it lasts: this rank's directory, place and copies, and the coordinator."""

    def __init__(self, env: Env, membership: Membership, meeting: Meeting | None) -> None:
        self._env = env
        self.membership = membership
        self.ended: Ending | None = None  # of a spare that never got a rank
        self._meeting = meeting
        self._server: CoordinatorServer | None = None
        self._coordinator: Coordinator | None = None
        self._lease: RendezvousLease | None = None
        self._ray: RayHost | None = None

    def __enter__(self) -> _World:
        with contextlib.ExitStack() as stack:
            self._estate = stack.enter_context(Estate(self._env, self.membership))
            self.shm_dir = self._estate.path
            if not self.membership.is_spare or self._takes_a_rank():
                self._enter_with_rank(stack)
            self._stack = stack.pop_all()
        return self

    def _takes_a_rank(self) -> bool:
        """Stands by; whether a rank became this spare's."""
        env, membership = self._env, self.membership
        assert self._meeting is not None  # as for a rank above 0
        outcome = stand_by(env, membership, self._meeting, self.shm_dir)
        if isinstance(outcome, Ending):
            self.ended = outcome
            return False
        self.membership = outcome
        set_up_logging(level=env.log_level, rank=outcome.rank, world_size=outcome.world_size)
        return True

    def _enter_with_rank(self, stack: contextlib.ExitStack) -> None:
        env, membership = self._env, self.membership
        if membership.rank == 0:
            self._client = self._host_coordinator(stack) if env.ray is None else self._host_in_ray(stack)
            if self._meeting is not None:
                self._meeting.announce(self._address, shrinks=membership.shrinks)
            answer = _join(self._client, membership, str(self.shm_dir))
        else:
            assert self._meeting is not None  # Membership.read refuses a rank above 0 without one
            found = _find_coordinator(env, membership, self._meeting, str(self.shm_dir))
            self._address, self._client, answer = found
            if self._address.can_move and membership.local_rank == 0:
                stack.enter_context(self._follow_in_ray())
        self._generation = int(answer["generation"])
        lineage = str(answer["lineage"])
        self._estate.claim(lineage, membership)
        self._peers = open_peers(env, membership, self.shm_dir, self._address.token, lineage, self._client)
        stack.callback(self._peers.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def run(
        self, trainers: Trainers, events: Events[Event], stores: GenerationStores | None, *, is_guarded: bool
    ) -> Ending:
        """Runs this rank until the world is over; see `Supervisor.run`."""
        env, membership = self._env, self.membership
        setup = Setup(
            rank=membership.rank,
            host=host_identity(),
            shm_dir=self.shm_dir,
            environ={
                **membership.environ,
                "ARC_COORDINATOR": self._address.url,
                "ARC_TOKEN": self._address.token,
                "ARC_JOB_ID": self._address.job_id,
                "ARC_RUN_DIR": self._address.run_dir,
                "ARC_COORDINATOR_FILE": str(node_file(Path(self._address.run_dir))) if self._address.can_move else "",
            },
            store_for=stores.prepare if stores is not None else None,
            generation_began=stores.retire if stores is not None else lambda generation: None,
            uses_store=membership.store_host is not None,
            grace_s=env.grace_s,
            preempt_signals=env.preempt_signals,
            is_guarded=is_guarded,
            peers=self._peers,
            coordinator_limit_s=PATIENCE_S if self._address.can_move else Setup.coordinator_limit_s,
        )
        supervisor = Supervisor(setup, self._client, trainers, events)
        reporter = StepReporter(membership.rank, membership.world_size, self.shm_dir, self._client)
        self._stack.callback(reporter.close)
        pulse = Pulse(
            rank=membership.rank,
            node=membership.node,
            world_size=membership.world_size,
            client=self._client,
            timeout_s=env.host_timeout_s,
            cut_off_s=self._cut_off_s(),
            events=events,
            lease=self._lease,
        )
        is_over = False
        try:
            ending = supervisor.run(self._generation)
            is_over = True
        finally:
            supervisor.close()
            pulse.close(says=is_over)
            self._part(supervisor)
        _await_launcher(ending, membership, supervisor)
        if not ending.survivors:  # a smaller world cannot use this one's memory
            self._estate.ends_with(ending.returncode, was_told=ending.was_told, has_run=supervisor.has_run)
        return ending

    def _host_coordinator(self, stack: contextlib.ExitStack) -> LocalClient:
        env, membership = self._env, self.membership
        self._lease = _lease(env)
        spec, run_dir = spec_of(env, membership)
        _, listen = advertised_host(membership)
        certificate = spec.certificate
        coordinator = spec.open(self._lease.problem) if self._lease is not None else spec.open()
        stack.callback(coordinator.close)
        self._coordinator = coordinator
        server = stack.enter_context(
            CoordinatorServer(coordinator, host=listen, token=spec.token, certificate=certificate)
        )
        self._server = server
        self._address = CoordinatorAddress(
            url=server.address, token=server.token, job_id=spec.job_id, run_dir=str(run_dir)
        )
        endpoint = Endpoint(
            url=server.address,
            token=server.token,
            job_id=spec.job_id,
            run_dir=spec.run_dir,
            world_size=membership.world_size,
            host=host_identity(),
            pid=os.getpid(),
            authority=None if env.tls_ca is None else str(env.tls_ca.absolute()),
        )
        for directory in (self.shm_dir, run_dir):  # the first goes with this process; the second is known
            path = endpoint.write(directory)
            stack.callback(endpoint.remove, path)
        return LocalClient(coordinator)

    def _host_in_ray(self, stack: contextlib.ExitStack) -> FollowingClient:
        """As `_host_coordinator`, with an actor. It knows no lease of this process, so it lets no world shrink."""
        env, membership, meeting = self._env, self.membership, self._meeting
        assert env.ray is not None
        spec, run_dir = spec_of(env, membership)
        place = Place(
            ray=env.ray,
            job_id=spec.job_id,
            run_dir=Path(spec.run_dir),
            authority=env.tls_ca,
            directories=(self.shm_dir, run_dir),
            stand_in_s=env.stand_in_s,
        )

        def announce(found: Endpoint) -> None:
            if meeting is not None:
                meeting.announce(address_of(found), shrinks=membership.shrinks)

        _, listen = advertised_host(membership)
        spec = dataclasses.replace(spec, min_nodes=0)
        self._ray = stack.enter_context(RayHost(place, spec=spec, listen=listen, announce=announce))
        self._address = address_of(self._ray.endpoint)
        return follower_of(env, self._address, _CLIENT_TIMEOUT_S)

    def _follow_in_ray(self) -> RayHost:
        env, address, meeting, shrinks = self._env, self._address, self._meeting, self.membership.shrinks
        assert meeting is not None
        place = Place(ray=env.ray or "auto", job_id=address.job_id, run_dir=Path(address.run_dir), authority=env.tls_ca)

        def look_up() -> Endpoint | None:
            found = meeting.look_up_briefly(shrinks=shrinks)
            return None if found is None else endpoint_of(env, found)

        return RayHost(place, first=endpoint_of(env, address), look_up=look_up)

    def _cut_off_s(self) -> float:
        """How long this host may not reach the coordinator before it must count itself as lost.

        As long as others are patient with it, where they may go on without it. Elsewhere nobody can; it waits for an
        actor to come back.
        """
        limit_s = self._env.host_timeout_s
        is_replaceable = not self.membership.has_agents
        return limit_s if is_replaceable or not self._address.can_move else max(limit_s, PATIENCE_S)

    def _part(self, supervisor: Supervisor) -> None:
        """Lets the others, or rank 0, know that this supervisor needs the coordinator no more."""
        meeting, server, membership = self._meeting, self._server, self.membership
        if meeting is None:
            return
        host = self._ray if server is None else server
        if host is None:
            meeting.leave(self._address.token, membership)
            return
        num_others = membership.num_workers - 1
        stop = self._coordinator.job.stop if self._coordinator is not None else None
        if stop is not None and not stop.is_eviction:
            num_others -= len(stop.lost)
        limit_s = max(_FAREWELL_LIMIT_S, self._env.grace_s) if supervisor.was_preempted else _FAREWELL_LIMIT_S
        meeting.await_others(self._address.token, num_others, lambda: host.num_connections, timeout_s=limit_s)


def _lease(env: Env) -> RendezvousLease | None:
    return RendezvousLease(env.rendezvous, env.host_timeout_s) if env.rendezvous and env.min_nodes else None


def _forget_old_world(events: Events[Event]) -> None:
    """Drops what threads of a world that is over have said since; signals and the zygote's words stay."""
    kept: list[Event] = []
    with contextlib.suppress(queue.Empty):
        while True:
            kept.append(events.get_nowait())
    for event in kept:
        if isinstance(event, (ZygoteSaid, ZygoteLost, Signalled, Noticed)):
            events.put(event)


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
    pid = os.getppid() if membership.has_agents else os.getpid()
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
    limit_s = _REJOIN_LIMIT_S if membership.shrinks else _JOIN_LIMIT_S
    deadline = time.monotonic() + limit_s
    problem = "nothing was announced"
    # So that more than one question fits into the silence after which a host is lost.
    client_timeout_s = min(_CLIENT_TIMEOUT_S, env.host_timeout_s / 3) if env.host_timeout_s else _CLIENT_TIMEOUT_S
    refused: CoordinatorAddress | None = None
    while time.monotonic() < deadline:
        found = meeting.look_up(timeout_s=1.0, shrinks=membership.shrinks)
        if found is None:
            continue
        if found.can_move:
            client = follower_of(env, found, client_timeout_s)
        else:
            client = CoordinatorClient(found.url, found.token, timeout_s=client_timeout_s, authority=env.tls_ca)
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
        f"rank {membership.rank}: no coordinator was found for {limit_s:.0f} s: {problem}. "
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
