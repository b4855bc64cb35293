"""A real S3 service: Ceph's radosgw, with one monitor and one file-backed OSD, on loopback.

    python tests/services/ceph.py            # prints the endpoint and the keys; Ctrl-C ends and removes everything

Everything lies in one temporary directory; neither /etc/ceph nor /var/lib/ceph is read or written. There is no manager
daemon: pools are created with fixed numbers of placement groups and nothing here needs statistics.

However the process that started it ends, SIGKILL included, the kernel kills the daemons (PR_SET_PDEATHSIG), and a guard
that holds the other end of a pipe removes the directory.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = {
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "monmaptool": "ceph-common",
    "setpriv": "util-linux",
}
READY_TIMEOUT_S = 120.0
_COMMAND_TIMEOUT_S = 60.0
_DISK_BYTES = 8 << 30  # a sparse file: only what is written takes room on the host
_FULL_RATIOS = (0.85, 0.90, 0.95)  # nearfull, backfillfull, full: Ceph's own defaults

# One replica on one OSD is what Ceph calls unsafe; it must be allowed by name.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {directory}/$name.keyring
run dir = {directory}
admin socket = {directory}/$name.sock
log file = {directory}/$name.log
log to stderr = false
pid file =
crash dir = {directory}/crash
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 0

[mon]
mon data = {directory}/mon

[osd]
osd data = {directory}/osd
osd objectstore = bluestore
bluestore block size = {disk_bytes}
bluestore block db create = false
bluestore block wal create = false
osd memory target = 939524096

[client.rgw]
rgw data = {directory}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw gc processor max time = 5
rgw bucket quota ttl = 0
rgw user quota bucket sync interval = 1
rgw s3 auth use sts = true
rgw sts key = 0123456789abcdef
rgw sts min session duration = 1
"""


class ServiceError(RuntimeError):
    """A service that is not installed, did not start, or refused a command; the message has what it said."""


def missing() -> str | None:
    """What to install, or None when all programs are there."""
    packages = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if not packages:
        return None
    return f"Ceph is not installed: apt-get install --no-install-recommends {' '.join(packages)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class User:
    """An S3 user of the gateway."""

    name: str
    access_key: str
    secret_key: str


class Cluster:
    """A running cluster; see `running`.

    Attributes:
        endpoint: the URL of the S3 service.
        user: its first user.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mon_port, self._port = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._conf = directory / "ceph.conf"
        # The programs are the system's own: neither this Python's environment nor the user's configuration is theirs.
        self._env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(directory), "LC_ALL": "C.UTF-8"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # The kernel kills a daemon with the thread that started it, so that is one that lives as long as the cluster.
        self._starter = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ceph-starter")
        self.user: User

    def start(self) -> None:
        """Brings all daemons up and creates the first user."""
        self._conf.write_text(
            _CONFIGURATION.format(
                fsid=uuid.uuid4(),
                mon_port=self._mon_port,
                port=self._port,
                directory=self.directory,
                disk_bytes=_DISK_BYTES,
            )
        )
        for name in ("mon", "osd", "rgw", "crash"):
            (self.directory / name).mkdir()
        self._start_monitor()
        self._start_osd()
        self.ceph(
            *("auth", "get-or-create", "client.rgw", "mon", "allow rw", "osd", "allow rwx"),
            *("-o", str(self.directory / "client.rgw.keyring")),
        )
        self.start_gateway()
        self.user = self.add_user("tester")

    def add_user(self, name: str) -> User:
        """A new S3 user with fresh keys, who may also take roles (`sts:AssumeRole`)."""
        made = json.loads(self.admin("user", "create", f"--uid={name}", f"--display-name={name}"))
        self.admin("caps", "add", f"--uid={name}", "--caps=roles=*")
        (key,) = made["keys"]
        return User(name=name, access_key=key["access_key"], secret_key=key["secret_key"])

    def set_bucket_quota(self, bucket: str, max_bytes: int | None) -> None:
        """Bounds what a bucket may hold; None: as much as it likes."""
        scope = ("--quota-scope=bucket", f"--bucket={bucket}", f"--uid={self.user.name}")
        if max_bytes is None:
            self.admin("quota", "disable", *scope)
            return
        self.admin("quota", "set", *scope, f"--max-size={max_bytes}")
        self.admin("quota", "enable", *scope)

    def set_full(self, full: bool) -> None:
        """Makes the OSD find itself full (by moving the ratio at which it does), or have room again; waits for it."""
        ratios = (1e-6, 2e-6, 3e-6) if full else _FULL_RATIOS
        names = ("nearfull", "backfillfull", "full")
        # Each of the three must stay below the next at every moment.
        for name, ratio in list(zip(names, ratios))[:: 1 if full else -1]:
            self.ceph("osd", f"set-{name}-ratio", f"{ratio:f}")
        self._wait(lambda: self.is_full() == full, f"the OSD to find itself {'full' if full else 'with room'}")

    def is_full(self) -> bool:
        """Whether an OSD has reported itself full."""
        osds = json.loads(self.ceph("osd", "dump", "--format=json"))["osds"]
        return any("full" in osd["state"] for osd in osds)

    def kill_gateway(self) -> int:
        """SIGKILLs the gateway; returns the exit code that it left (-9)."""
        daemon = self._daemons.pop("radosgw")
        daemon.kill()
        return daemon.wait()

    def start_gateway(self) -> None:
        """Starts the gateway, at its endpoint of before, and waits until it answers."""
        daemon = self._start("radosgw", "-n", "client.rgw", "-f")
        self._wait(self._answers, "radosgw to answer", daemon)

    def ceph(self, *arguments: str) -> str:
        """What `ceph ARGUMENTS` prints."""
        return self._run("ceph", "-c", str(self._conf), "--connect-timeout=30", *arguments)

    def admin(self, *arguments: str) -> str:
        """What `radosgw-admin ARGUMENTS` prints."""
        return self._run("radosgw-admin", "-c", str(self._conf), "-n", "client.rgw", *arguments)

    def pids(self) -> list[int]:
        """The daemons."""
        return [daemon.pid for daemon in self._daemons.values()]

    def stop(self) -> None:
        """Ends all daemons at once: nobody needs what they hold."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        self._starter.shutdown()

    def _start_monitor(self) -> None:
        admin = self.directory / "client.admin.keyring"
        first = self.directory / "first.keyring"
        monmap = self.directory / "monmap"
        everything = [word for daemon in ("mon", "osd", "mgr") for word in ("--cap", daemon, "allow *")]
        make = ("ceph-authtool", "--create-keyring", "--gen-key")
        self._run(*make, str(admin), "-n", "client.admin", *everything)
        self._run(*make, str(first), "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", str(first), "--import-keyring", str(admin))
        fsid = self._run("ceph-conf", "-c", str(self._conf), "--lookup", "fsid").strip()
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, str(monmap))
        options = ("-c", str(self._conf), "-i", "a")
        self._run("ceph-mon", *options, "--mkfs", "--monmap", str(monmap), "--keyring", str(first))
        daemon = self._start("ceph-mon", "-i", "a", "-f")
        self._wait(lambda: self._succeeds("mon", "stat"), "the monitor to answer", daemon)

    def _start_osd(self) -> None:
        osd_id = str(uuid.uuid4())
        number = self.ceph("osd", "new", osd_id).strip()
        self.ceph(
            *("auth", "get-or-create", f"osd.{number}", "mon", "allow profile osd", "osd", "allow *"),
            *("-o", str(self.directory / f"osd.{number}.keyring")),
        )
        self._run("ceph-osd", "-c", str(self._conf), "-i", number, "--mkfs", "--osd-uuid", osd_id)
        daemon = self._start("ceph-osd", "-i", number, "-f")
        self._wait(
            lambda: json.loads(self.ceph("osd", "stat", "--format=json"))["num_up_osds"] == 1,
            "the OSD to be up",
            daemon,
        )

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{program}.out", "ab") as output:
            daemon = self._starter.submit(
                subprocess.Popen,
                ["setpriv", "--pdeathsig", "KILL", program, "-c", str(self._conf), *arguments],
                env=self._env,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us to handle
            ).result()
        self._daemons[program] = daemon
        return daemon

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=2).close()
        except urllib.error.HTTPError:
            return True  # it refuses, so it is there
        except OSError:
            return False
        return True

    def _succeeds(self, *arguments: str) -> bool:
        try:
            self.ceph(*arguments)
        except ServiceError:
            return False
        return True

    def _wait(self, condition: Callable[[], bool], what: str, daemon: subprocess.Popen[bytes] | None = None) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            ended = daemon is not None and daemon.poll() is not None
            if ended or time.monotonic() > deadline:
                why = "it ended" if ended else f"not within {READY_TIMEOUT_S:.0f} s"
                raise ServiceError(f"waited for {what}: {why}.\n{self._logs()}")
            time.sleep(0.2)

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command, env=self._env, cwd=self.directory, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise ServiceError(
                f"{' '.join(command)}: no end within {_COMMAND_TIMEOUT_S:.0f} s\n{self._logs()}"
            ) from None
        if done.returncode != 0:
            raise ServiceError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return done.stdout

    def _logs(self) -> str:
        files = [path for pattern in ("*.log", "*.out") for path in self.directory.glob(pattern)]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(files))


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster, ready for requests, until the block ends.

    Raises:
        ServiceError: programs are missing, or a daemon does not come up; the message has its log.
    """
    if (reason := missing()) is not None:
        raise ServiceError(reason)
    with _removed_whatever_happens() as directory:
        cluster = Cluster(directory)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@contextlib.contextmanager
def _removed_whatever_happens() -> Iterator[Path]:
    """A new directory with a short name (sockets lie in it); a guard removes it even when this process is killed."""
    directory = Path(tempfile.mkdtemp(prefix="arc-ceph-"))
    # The daemons may write for a moment longer than their parent lives, so the removal is repeated.
    script = 'cat >/dev/null; for i in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$1" && exit 0; sleep 0.5; done; exit 1'
    guard = subprocess.Popen(["sh", "-c", script, "sh", str(directory)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield directory
    finally:
        guard.communicate()
        if guard.returncode != 0:
            raise ServiceError(f"{directory} could not be removed. Remove it by hand.")


def environment(cluster: Cluster, user: User | None = None) -> Mapping[str, str]:
    """The standard variables by which S3 clients find the service."""
    user = user or cluster.user
    return {
        "AWS_ENDPOINT_URL": cluster.endpoint,
        "AWS_ACCESS_KEY_ID": user.access_key,
        "AWS_SECRET_ACCESS_KEY": user.secret_key,
        "AWS_DEFAULT_REGION": "default",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def main() -> int:
    """Runs a cluster until it is told to stop (Ctrl-C, SIGTERM)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        with running() as cluster:
            for name, value in environment(cluster).items():
                print(f"export {name}={value}")
            print("# ready; ends with Ctrl-C", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except ServiceError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
