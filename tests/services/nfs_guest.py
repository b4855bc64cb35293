"""Inside the machine that `nfs` boots: its NFS server, its clients, and what can be done to them.

::

    DISK     what the server serves: a tmpfs of DISK_BYTES, so that it can be full
    EXPORT   the directory of it that the client mounts, as the server sees it
    NFS      the same through an NFSv4 mount
    OTHER    a directory that is not on NFS
    HOST     a directory of the host, writable, that is gone after the run

As a program it starts the server, mounts, and goes on as the Python program that its arguments name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DISK = Path("/media/disk")
EXPORT = DISK / "share"
NFS = Path("/media/nfs")
OTHER = Path("/media/other")
HOST = Path("/media/host")
DISK_BYTES = 24 << 20

GRACE_S = 10  # nfsd takes no less: for so long after its start it lets clients reclaim what they had, and nothing else
SOFT = "soft,timeo=10,retrans=2"  # 1 s for each of three attempts, then EIO
HARD = "hard,timeo=10,retrans=2"
_EEXIST = 17
_CLONE_NEWNS = 0x20000
_FINIT_MODULE = 313  # x86-64, as user-mode-linux is
_CONTROL = Path("/proc/fs/nfsd")
_LIBC = ctypes.CDLL(None, use_errno=True)


def set_up() -> None:
    """Starts the server on an empty export and mounts it, soft, at NFS."""
    for module in ("nfsd", "nfsv4"):
        _load(module)
    for directory in (DISK, NFS, OTHER, Path("/var/lib/nfs/v4recovery"), Path("/var/lib/nfs/rpc_pipefs")):
        directory.mkdir(parents=True)
    for name in ("etab", "rmtab"):
        Path("/var/lib/nfs", name).touch()
    run("mount", "-t", "nfsd", "nfsd", str(_CONTROL))
    for name in ("nfsv4leasetime", "nfsv4gracetime"):
        (_CONTROL / name).write_text(f"{GRACE_S}\n")
    mount_disk()
    export()
    run("rpc.mountd", "-N", "3")
    start_server()
    mount(NFS)


def run(*command: str) -> str:
    """Runs a command that must succeed; returns what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------------- the server


def mount_disk() -> None:
    """Puts a new, empty file system where the server looks."""
    run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "tmpfs", str(DISK))
    # A test that believed in a mount that is not there would fill the memory.
    assert os.path.ismount(DISK)
    state = os.statvfs(DISK)
    assert state.f_blocks * state.f_frsize == DISK_BYTES
    EXPORT.mkdir(mode=0o755)


def resize_disk(nbytes: int) -> None:
    """Gives the disk another size; what is on it stays."""
    assert os.path.ismount(DISK)
    run("mount", "-o", f"remount,size={nbytes}", str(DISK))


def replace_disk() -> None:
    """Serves another file system under the same name: all handles of the old one are stale."""
    run("exportfs", "-ua")
    run("exportfs", "-f")
    run("umount", "-l", str(DISK))
    mount_disk()
    export()


def export(*, squash_root: bool = False) -> None:
    squash = "root_squash" if squash_root else "no_root_squash"
    run("exportfs", "-o", f"rw,fsid=0,{squash},insecure,no_subtree_check,sync", f"127.0.0.1:{DISK}")
    run("exportfs", "-f")


def start_server(*, grace: bool = False) -> None:
    """With `grace`, as after a crash: for GRACE_S seconds clients can only reclaim what they had open."""
    run("rpc.nfsd", "-N", "3", "-V", "4.1", "-V", "4.2", "4")
    assert is_serving()
    if not grace:
        _end_grace()


def _end_grace() -> None:
    for _ in range(1000):
        try:
            (_CONTROL / "v4_end_grace").write_text("Y\n")
            return
        except OSError as error:
            if error.errno != errno.EBUSY:  # the server has not yet begun its grace time
                raise
            time.sleep(0.01)
    raise TimeoutError("the server does not begin its grace time")


def stop_server() -> None:
    """From now on connections are refused. The server forgets what clients have open."""
    run("rpc.nfsd", "0")
    assert not is_serving()


def is_serving() -> bool:
    return (_CONTROL / "threads").read_text().strip() != "0"


# ---------------------------------------------------------------------- clients


def mount(where: Path, options: str = SOFT, *, version: str = "4.2") -> None:
    """Mounts the export. Each mount has caches of its own, as if it were another host."""
    where.mkdir(exist_ok=True)
    run("mount", "-t", "nfs4", "-o", f"vers={version},nosharecache,{options}", "127.0.0.1:/share", str(where))
    assert mount_options(where).startswith(f"rw,relatime,vers={version},")


def remount(options: str = SOFT, *, version: str = "4.2") -> None:
    """Mounts NFS with other options."""
    run("umount", str(NFS))
    mount(NFS, options, version=version)


def mount_options(where: Path) -> str:
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    (options,) = [row[3] for row in rows if row[1] == str(where) and row[2] == "nfs4"]
    return options


def move_to_another_client(where: Path) -> None:
    """For this process alone, NFS is the mount at `where` from now on."""
    assert _LIBC.unshare(_CLONE_NEWNS) == 0
    run("mount", "--make-rprivate", "/")
    run("mount", "--bind", str(where), str(NFS))


def _load(module: str) -> None:
    """Loads a kernel module and what it needs, without the tools that a container has not."""
    base = Path("/usr/lib/uml/modules", os.uname().release)
    rows = [line.partition(":") for line in (base / "modules.dep").read_text().splitlines()]
    needs = {name: rest.split() for name, _, rest in rows}
    (path,) = [name for name in needs if name.endswith(f"/{module}.ko")]
    for name in [*reversed(needs[path]), path]:
        with open(base / name, "rb") as file:
            if _LIBC.syscall(_FINIT_MODULE, file.fileno(), b"", 0) != 0 and ctypes.get_errno() != _EEXIST:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Polls; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)
    return time.monotonic() - began


if __name__ == "__main__":
    set_up()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
