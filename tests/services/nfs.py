"""A real NFSv4 server and client for tests, on machines whose own kernel has neither.

Debian's user-mode-linux is a Linux kernel that runs as a program. It boots in two seconds with this machine's files as
its root (read-only), serves a small file system of its own with its own nfsd, mounts it through its own NFSv4 client,
and runs a Python program there with the interpreter that runs the tests. It has one CPU, and is about six times slower.

What happens inside before the program starts, and what the program can do to the server, is in `nfs_guest`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

KERNEL = "linux.uml"
TOOLS = {KERNEL: "user-mode-linux", "rpc.nfsd": "nfs-kernel-server", "mount.nfs4": "nfs-common", "ip": "iproute2"}
PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MEMORY = "2048M"  # at most: it takes what it uses
END_S = 30.0  # for what was killed to be gone
TESTS = Path(__file__).resolve().parent.parent

_BOOT = """#!/bin/sh
export PATH={places}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for directory in /media /run /var/lib/nfs; do mount -t tmpfs tmpfs $directory; done
mkdir -p /dev/shm /media/tmp /media/host
mount -t tmpfs tmpfs /dev/shm
mount -t hostfs none /media/host -o {work}
hostname localhost
ip link set lo up
cd /media/tmp
{program} >/media/host/stdout 2>/media/host/stderr </dev/null
echo $? >/media/host/exit_code
halt -f
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NfsRun:
    """How a program on an NFS mount ended. `console` is what the kernel said."""

    exit_code: int
    stdout: str
    stderr: str
    console: str


class NfsFailed(AssertionError):
    """The machine inside did not boot, or the program did not end in time; the message has all that was said."""


def why_not() -> str | None:
    """Why there can be no NFS here, with the remedy; None when there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for a real NFS server"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool, path=PLACES) is None]
    if missing:
        return f"no real NFS server here: apt-get install {' '.join(missing)}"
    return None


def run_on_nfs(
    program: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 300.0
) -> NfsRun:
    """Boots, runs `python program arguments...` beside a server and a mounted client, and waits for its end.

    Nothing is left when this returns or raises. No process is left when it is killed: all are in a PID namespace that
    dies with the process that started it. The program can write nothing of this machine but what is below its
    `nfs_guest.HOST`.

    Raises:
        NfsFailed: there was no exit code within `timeout_s`.
    """
    reason = why_not()
    if reason:
        raise NfsFailed(reason)
    work = Path(tempfile.mkdtemp(prefix="nfs-"))
    try:
        boot = work / "boot"
        boot.write_text(_boot_script(program, arguments, env or {}, work))
        boot.chmod(0o700)
        console = _run_kernel(_kernel_command(boot), work, timeout_s)
        said = {name: _read(work / name) for name in ("stdout", "stderr", "exit_code")}
    finally:
        shutil.rmtree(work)
    if not said["exit_code"].strip():
        raise NfsFailed(
            f"{program.name} {' '.join(arguments)}: no exit code after {timeout_s:g} s at most\n--- console\n{console}"
            f"\n--- stdout\n{said['stdout']}\n--- stderr\n{said['stderr']}"
        )
    exit_code = int(said["exit_code"])
    return NfsRun(exit_code=exit_code, stdout=said["stdout"], stderr=said["stderr"], console=console)


def _boot_script(program: Path, arguments: tuple[str, ...], env: Mapping[str, str], work: Path) -> str:
    variables = {
        # As here, so that the package under test is the same; tests of the built wheel have it in their path.
        "PYTHONPATH": os.pathsep.join([str(TESTS), *[entry for entry in sys.path if entry]]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": "/media/tmp",
        "TMPDIR": "/media/tmp",
        "GLOO_SOCKET_IFNAME": "lo",
        **env,
    }
    settings = [f"{name}={value}" for name, value in variables.items()]
    command = ["env", *settings, sys.executable, "-m", "services.nfs_guest", str(program.resolve()), *arguments]
    return _BOOT.format(places=PLACES, work=shlex.quote(str(work)), program=shlex.join(command))


def _kernel_command(boot: Path) -> list[str]:
    kernel = shutil.which(KERNEL, path=PLACES)
    assert kernel is not None
    # Alone in a PID namespace that is killed with its parent: the kernel forks helpers that outlive a SIGKILL.
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    root = ["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={boot}"]
    return [*unshare, kernel, f"mem={MEMORY}", *root, "con=null", "con0=null,fd:1", "quiet", "panic=1"]


def _run_kernel(command: list[str], work: Path, timeout_s: float) -> str:
    """Runs the kernel until it halts or the time is over; returns its console when all of its processes are gone."""
    # Should the tests be killed themselves, their child gets SIGKILL, and `unshare` takes the rest with it.
    mortal = ["setpriv", "--pdeathsig", "KILL", "--"]
    alive, held = os.pipe()  # each process of the machine inherits one end: the other ends when all are dead
    try:
        with open(work / "console", "wb") as console:
            process = subprocess.Popen(
                [*mortal, *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "TMPDIR": str(work)},  # the memory of the machine, a sparse file
                pass_fds=[held],
                start_new_session=True,
            )
        os.close(held)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass  # there is no exit code then, and the caller says so
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(END_S)
            if not select.select([alive], [], [], END_S)[0]:
                raise NfsFailed(f"processes of {command} are still there {END_S:g} s after SIGKILL")
    finally:
        os.close(alive)
    return _read(work / "console")


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
