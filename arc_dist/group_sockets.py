"""The connections to other ranks that process groups hold, so that they can be cut, and seen to be closed.

gloo has no way to give up a collective: one that waits for a live peer waits until the group's timeout, and a group
that is destroyed waits for its collectives. To the kernel, though, a connection that is shut down is that of a process
that died, and then every collective over it fails at once, at both ends.

Torch does not tell which descriptors a group opened, so the process's sockets are compared before and after.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

_MAKER = "_new_process_group_helper"  # what init_process_group, new_group and the rest all call


class PeerConnections:
    """The sockets that process groups opened since `watch`.

    Where a later torch has no function of that name nothing is known of them: collectives then fail by themselves, as
    far as they do.
    """

    def __init__(self) -> None:
        self._sockets: dict[int, int] = {}  # descriptor -> inode; a descriptor alone may have been used again
        self._before: dict[int, int] | None = None  # while a group is being made: what was open before it
        self._maker: Callable[..., Any] | None = None

    def watch(self) -> None:
        """Begins to note what each new group opens."""
        self._maker = getattr(c10d, _MAKER, None)
        if self._maker is not None:
            setattr(c10d, _MAKER, self._make)

    def unwatch(self) -> None:
        """Gives torch its function back."""
        if self._maker is not None:
            setattr(c10d, _MAKER, self._maker)
            self._maker = None

    def _make(self, *args: Any, **kwargs: Any) -> Any:
        assert self._maker is not None
        before = self._before = _open_sockets()
        try:
            return self._maker(*args, **kwargs)
        finally:
            self._before = None
            self._sockets.update(_open_sockets().items() - before.items())

    def cut(self, store_port: int) -> None:
        """Shuts them down. Safe from any thread; the sockets stay open until their groups are gone.

        Args:
            store_port: of the generation's own store, at which a group that is being made waits for its peers.
        """
        before = self._before
        of_groups = self._sockets.copy()
        if before is not None:  # one is being made right now
            of_groups.update(_open_sockets().items() - before.items())
        for descriptor, inode in _open_sockets().items():
            with contextlib.suppress(OSError):  # closed meanwhile, or never connected
                copy = os.dup(descriptor)
                if os.fstat(copy).st_ino != inode:
                    os.close(copy)
                    continue
                with socket.socket(fileno=copy) as sock:
                    if _is_to(sock, store_port) or (of_groups.get(descriptor) == inode and not _accepts(sock)):
                        sock.shutdown(socket.SHUT_RDWR)

    def num_open(self) -> int:
        """How many are still there: not all groups are gone."""
        return len(self._sockets.items() & _open_sockets().items())


def _accepts(sock: socket.socket) -> bool:
    """Whether it waits for connections: gloo's thread ends the process when that fails."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_to(sock: socket.socket, port: int) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getpeername()[1] == port


def _open_sockets() -> dict[int, int]:
    """Descriptor -> inode of this process's sockets."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:["):
                found[int(name)] = int(target[8:-1])
    return found


def forget_groups() -> None:
    """Destroys every process group, and what torch keeps of one whose making failed.

    Groups are named by a count. Where it is not that of a new process, the ranks wait for each other under two names.
    """
    if c10d.is_initialized():
        c10d.destroy_process_group()
    world = c10d._world
    for kept in (
        *(world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config),
        *(world.pg_to_tag, world.tags_to_pg, world.pg_coalesce_state),
    ):
        kept.clear()
    world.group_count = 0
    c10d._unregister_all_process_groups()


def forget_meshes(mark: str) -> None:
    """Takes their groups from the device meshes that are still there, and makes them equal to no later one.

    DTensor remembers how it sharded an operation, with the mesh in the answer. A mesh of the next generation is equal
    to the old one as far as it is compared, so it would be given answers that name groups of the old one.
    """
    module = sys.modules.get("torch.distributed.device_mesh")
    if module is None:
        return
    _clear_caches()
    for thing in gc.get_objects():
        if type(thing) is module.DeviceMesh and hasattr(thing, "_thread_id"):
            thing._thread_id = mark  # what keeps the meshes of two threads apart
            thing._hash = None
            getattr(thing, "_pg_registry", {}).clear()


def _clear_caches() -> None:
    """Those of DTensor that grow without a bound, as far as this torch has them."""
    clear: Callable[[], None] | None = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:
        clear()
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return
    propagator: Any = tensor.DTensor._op_dispatcher.sharding_propagator
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    for owner, name in (
        (propagator, "propagate_op_sharding"),
        (propagator, "_propagate_tensor_meta_cached"),
        (redistribute, "_gen_transform_infos"),
    ):
        cached = getattr(owner, name, None)
        forget: Callable[[], None] | None = getattr(cached, "cache_clear", None)
        if forget is not None:
            forget()
    planners = getattr(redistribute, "_planner_cache", None)
    if planners is not None:
        planners.clear()
