"""Hosts on one machine: each a network namespace with an address of its own, on one bridge, with its own memory.

A host has its own network, name and /dev/shm; files are shared, as on a cluster's file system. It can be cut off,
stopped as a whole (its processes freeze), or lose its power (its processes die and nobody is told, because the cut
comes first).

What hosts share must not lie in /dev/shm: tests of them have the mark `disk`.

::

    with Network(3) as network:
        job = network.start(1, [sys.executable, "train.py"], env={})
        network.cut(1)
        network.mend(1)
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ranks import Job

_TOOLS = ("ip", "nft", "unshare")
_TABLE = "arc"


def problem() -> str:
    """Why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"the tools {', '.join(missing)} are missing; install iproute2, nftables and util-linux"
    try:
        with Network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"needs root with the right to make network namespaces: {error.stderr.strip()}"


class Network:
    """`num_hosts` hosts, numbered from 0, on a bridge; all is gone at the end of the `with` statement."""

    def __init__(self, num_hosts: int) -> None:
        self._tag = secrets.token_hex(3)  # a namespace's interfaces may outlive it for a moment
        self._bridge = f"ab{self._tag}"
        self._hosts = range(num_hosts)

    def __enter__(self) -> Network:
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "link", "set", self._bridge, "up")
            for host in self._hosts:
                self._add(host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove()

    def _add(self, host: int) -> None:
        name, outer = self.name(host), self._outer(host)
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", outer, "master", self._bridge, "up")
        self._inside(host, "ip", "link", "set", "lo", "up")
        self._inside(host, "ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._inside(host, "ip", "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for host in self._hosts:
            subprocess.run(["ip", "link", "del", self._outer(host)], capture_output=True)  # none yet, or gone
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    def _outer(self, host: int) -> str:
        return f"av{self._tag}{host}"

    def name(self, host: int) -> str:
        return f"arc{self._tag}h{host}"

    def address(self, host: int) -> str:
        return f"10.77.7.{host + 1}"

    def start(self, host: int, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Job:
        """A job on that host, to be entered: with its name, its network and a memory file system of its own."""
        inner = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        argv = ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "--mount"]
        argv += ["sh", "-c", inner, f"host{host}", *command]
        settings = {"GLOO_SOCKET_IFNAME": "eth0", "ARC_SHM_ROOT": "/dev/shm", **(env or {})}
        return Job(argv, env=settings)

    def cut(self, host: int, *, incoming: bool = True, outgoing: bool = True) -> None:
        """From now on packets of others do not come in, or none leave; nobody is told."""
        rules = [f"add table inet {_TABLE}"]
        for chain, is_cut in (("input", incoming), ("output", outgoing)):
            if is_cut:
                rules.append(f"add chain inet {_TABLE} {chain} {{ type filter hook {chain} priority 0; }}")
                interface = "iifname" if chain == "input" else "oifname"
                rules.append(f'add rule inet {_TABLE} {chain} {interface} "eth0" counter drop')
        self._inside(host, "nft", "; ".join(rules))

    def dropped(self, host: int) -> int:
        """How many packets a cut has held back."""
        words = self._inside(host, "nft", f"list table inet {_TABLE}").split()
        return sum(int(words[i + 1]) for i, word in enumerate(words) if word == "packets")

    def mend(self, host: int) -> None:
        """Ends a cut."""
        self._inside(host, "nft", f"delete table inet {_TABLE}")

    def _inside(self, host: int, *command: str) -> str:
        return _run("ip", "netns", "exec", self.name(host), *command)


def freeze(job: Job) -> list[int]:
    """Stops all processes of a host at once, as when its machine is suspended; returns them."""
    frozen: set[int] = set()
    while more := [pid for pid in job.pids() if pid not in frozen]:
        for pid in more:
            os.kill(pid, signal.SIGSTOP)
            frozen.add(pid)
    deadline = time.monotonic() + 60
    while not all(_state(pid) in "TtZX" for pid in frozen):
        assert time.monotonic() < deadline, "a process cannot be stopped"
        time.sleep(0.01)
    return sorted(frozen)


def thaw(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
