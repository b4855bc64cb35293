"""`resilient`: a training function that is entered again in the surviving processes when a rank is lost.

Under a supervisor the processes of a generation end with it, and new ones are forked. That is quick, but what lived in
the process is gone: a CUDA context, a large compile cache. A process inside a `resilient` function stays instead: what
the lost peer breaks unwinds to the decorator, which drops all that belonged to the old generation, says so, and calls
the function again with what a new process would have found in its environment. See docs/in-process.md.

Whatever does not go as it should leads to what happens without it: the supervisor ends the process, and forks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import queue
import random
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from arc_dist.config import Env
from arc_dist.errors import ArcError, InfrastructureError
from arc_dist.protocol import budgets
from arc_dist.supervisor import channel, process, script, wire, zygote
from arc_dist.telemetry.log import logger, set_up_logging

if TYPE_CHECKING:
    from arc_dist.group_sockets import PeerConnections

_P = ParamSpec("_P")
_R = TypeVar("_R")

_SHARE_OF_WAIT = 0.5  # of the time to leave: how long what the function left behind may take to go away
_POLL_S = 0.005


class Abandoned(Protocol):
    """What is told to give up when its generation ends."""

    def abandon(self, error: BaseException) -> None: ...


training: weakref.WeakSet[Any] = weakref.WeakSet()
"""Each `Abandoned` that has started; it may be in the middle of anything when a peer is lost."""

_renewals: list[Callable[[], None]] = []
_present: _Stayer | None = None
_num_entered = 0  # functions of this process that could have been entered again


def at_reentry(renew: Callable[[], None]) -> None:
    """Has `renew` called, in a process that stays, before its function is called again."""
    _renewals.append(renew)


def stays() -> bool:
    """Whether this process goes on in the next generation: who loses a peer is to unwind at once."""
    return _present is not None


@overload
def resilient(function: Callable[_P, _R], *, within_s: float | None = None) -> Callable[_P, _R]: ...
@overload
def resilient(
    function: None = None, *, within_s: float | None = None
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]: ...
def resilient(function: Callable[..., Any] | None = None, *, within_s: float | None = None) -> Callable[..., Any]:
    """Enters a training function again, in the same process, when another rank was lost.

    ::

        @arc_dist.resilient
        def main():
            dist.init_process_group("gloo")
            model = DistributedDataParallel(Net())
            for step in Arc(model, torch.optim.AdamW(model.parameters())).train(loss_fn, loader):
                ...

    The function must build everything inside: process groups, model, optimizer, loader. What it returns is passed
    through, and so is every exception that is not the loss of a peer. Without a supervisor it is called as it is.

    Args:
        function: called in the main thread, before any process group exists.
        within_s: how long this process may take to get rid of the old generation, in seconds; default
            ``ARC_REENTRY_S``. After that its supervisor ends it and forks another, as it does without the decorator.
            0 turns re-entry off.
    """
    if function is None:
        return functools.partial(resilient, within_s=within_s)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        stayer = _stayer(function.__qualname__, within_s)
        if stayer is None:
            return function(*args, **kwargs)
        with stayer:
            return stayer.run(lambda: function(*args, **kwargs))

    return run


def _stayer(name: str, within_s: float | None) -> _Stayer | None:
    """What keeps this process alive; None, with a word in the log, where nothing can."""
    global _num_entered
    if _present is not None:
        return None  # the outer function is the one to be entered again
    env = Env.read()
    set_up_logging(level=env.log_level, rank=env.rank, world_size=env.world_size)
    limit_s = env.reentry_s if within_s is None else within_s
    obstacle = _obstacle(env, limit_s)
    if obstacle:
        logger.info("%s() is not entered again in this process: %s", name, obstacle)
        return None
    assert env.shm_dir is not None
    try:
        sock = channel.connect(env.shm_dir)
    except OSError as error:
        logger.warning("%s() is not entered again in this process: its supervisor does not answer: %s", name, error)
        return None
    _num_entered += 1
    return _Stayer(_Channel(sock), env.generation, limit_s)


def _obstacle(env: Env, limit_s: float) -> str:
    """Why this call cannot be repeated in this process; "" when it can."""
    if not env.supervised or env.shm_dir is None:
        return "there is no supervisor (start the job with arcrun, or torchrun -m arc_dist)"
    if limit_s <= 0:
        return "it is turned off"
    if threading.current_thread() is not threading.main_thread():
        return "it runs in a thread"
    if _num_entered:
        # A new process begins with the first one, and its peers must do what it does.
        return "another function was entered before it"
    c10d = sys.modules.get("torch.distributed")
    if c10d is not None and c10d.is_available() and c10d.is_initialized():
        return "a process group was made before it. Call init_process_group inside the function"
    return ""


class _Channel:
    """The trainer's end of the way to its supervisor, and the thread that hears its orders."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._orders: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()

    def listen(self, on_leave: Callable[[int], None]) -> None:
        threading.Thread(target=self._run, args=(on_leave,), name="arc-reentry", daemon=True).start()

    def _run(self, on_leave: Callable[[int], None]) -> None:
        try:
            while (message := wire.receive(self._sock)) is not None:
                if message["order"] == "leave":
                    on_leave(int(message["generation"]))
                else:
                    self._orders.put(message)
        except (OSError, ValueError) as error:
            logger.debug("the way to the supervisor broke: %s", error)
        self._orders.put(None)

    def say(self, event: str, generation: int, **more: Any) -> None:
        """Tells the supervisor; one that is gone takes this process with it."""
        wire.send(self._sock, {"event": event, "generation": generation, **more})

    def await_entry(self) -> Mapping[str, Any]:
        """Waits for the order to enter; bounded by the supervisor, which ends this process or is ended with it."""
        order = self._orders.get()
        if order is None:
            raise InfrastructureError("the supervisor is gone, and with it the job. Start it again.")
        return order

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed already
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a close alone does not
        self._sock.close()


class _Stayer:
    """Calls a function again and again, one generation after the other; use it in a `with` statement."""

    def __init__(self, way: _Channel, generation: int, within_s: float) -> None:
        from arc_dist.group_sockets import PeerConnections

        self._channel = way
        self._generation = generation
        self._within_s = within_s
        self._is_asked = False
        self._peers: PeerConnections = PeerConnections()
        self._threads = frozenset(threading.enumerate())
        self._children = frozenset(process.children(os.getpid()))

    def __enter__(self) -> _Stayer:
        global _present
        _present = self
        self._peers.watch()
        self._channel.listen(self._leave)
        self._threads |= frozenset(threading.enumerate())
        self._channel.say("began", self._generation, within_s=self._within_s)
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _present
        _present = None
        self._peers.unwatch()
        self._channel.close()

    def _leave(self, generation: int) -> None:
        """In the channel's thread: the generation is over. The main thread learns it from its next collective."""
        if generation == self._generation:
            self._is_asked = True
            self._peers.cut(int(os.environ.get("MASTER_PORT", "0")))
            _abort_accelerators()

    def run(self, call: Callable[[], _R]) -> _R:
        """Calls until the function returns, or raises what is not the loss of a peer."""
        while True:
            try:
                return call()
            except Exception as error:
                if not self._may_leave(error):
                    raise
                self._unwind(error)
            # The exception is gone here, and the frames of the old generation with it.
            reason = self._clean_up()
            if reason:
                logger.warning("this process cannot go on in the next generation: %s", reason)
                self._channel.say("stuck", self._generation, reason=reason)
            else:
                self._channel.say("left", self._generation)
            self._enter(self._channel.await_entry())

    def _may_leave(self, error: Exception) -> bool:
        """Whether this is the end of a generation, and not one that the script brought about itself."""
        if _is_loss(error):
            return True
        return self._is_asked and (isinstance(error, InfrastructureError) or not isinstance(error, ArcError))

    def _unwind(self, error: Exception) -> None:
        """Leaves the last committed state in memory, stops what runs on, and cuts the references to it."""
        level, what = (logging.DEBUG, repr(error)) if _is_loss(error) else (logging.WARNING, _in_full(error))
        logger.log(level, "generation %d is left because of %s", self._generation, what)
        script.note(error)
        self._peers.cut(int(os.environ.get("MASTER_PORT", "0")))
        for each in list(training):
            each.abandon(error)
        training.clear()
        link: BaseException | None = error
        seen: set[int] = set()
        while link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None
            link = link.__cause__ or link.__context__

    def _clean_up(self) -> str:
        """Gets rid of the groups and the memory of the old generation; why it cannot, or ""."""
        import torch

        from arc_dist.group_sockets import forget_groups, forget_meshes

        try:
            forget_groups()
        except RuntimeError as error:
            return f"its process groups cannot be destroyed: {error}"
        gc.collect()
        forget_meshes(f"generation {self._generation}")
        deadline = time.monotonic() + _SHARE_OF_WAIT * self._within_s
        while (left := self._left_behind()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return left

    def _left_behind(self) -> str:
        """What of the old generation is still there."""
        if self._peers.num_open():
            return "a process group is held by something outside of the function, or waits in a collective"
        own = ("arc-save-", "arc-drain")  # daemons, but they write what the next generation will want to
        for thread in set(threading.enumerate()) - self._threads:
            if not thread.daemon or thread.name.startswith(own):
                return f"the thread {thread.name} goes on"
        children = set(process.children(os.getpid())) - self._children - _helpers()
        return f"its child process {min(children)} goes on" if children else ""

    def _enter(self, order: Mapping[str, Any]) -> None:
        """Makes this process what a newly forked one would be."""
        os.environ.update(order["set"])
        self._generation = int(order["generation"])
        self._is_asked = False
        zygote.fresh_random_state()
        random.seed()
        for renew in _renewals:
            renew()
        self._channel.say("began", self._generation, within_s=self._within_s)


def _is_loss(error: BaseException) -> bool:
    told = script.telling(error)
    return budgets.is_echo_of(type(told).__name__, str(told))


def _in_full(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()


def _helpers() -> set[int]:
    """Processes of multiprocessing that live as long as this one."""
    import multiprocessing.forkserver
    import multiprocessing.resource_tracker

    tracker: Any = multiprocessing.resource_tracker._resource_tracker  # type: ignore[attr-defined]
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    return {pid for pid in (tracker._pid, server._forkserver_pid) if pid is not None}


def _abort_accelerators() -> None:
    """NCCL can give up its collectives, unlike gloo. Best effort: what stays blocked is ended by the supervisor."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if not (dist.is_available() and torch.cuda.is_available() and dist.is_initialized()):
        return
    for group in list(c10d._world.pg_map):
        try:
            if "nccl" in dist.get_backend_config(group):
                group._get_backend(torch.device("cuda")).abort()
        except RuntimeError as error:
            logger.debug("a group was not aborted: %s", error)
