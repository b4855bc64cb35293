"""Settings: arguments over environment over defaults. The one place that reads the environment."""

from __future__ import annotations

import dataclasses
import getpass
import json
import math
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Env:
    """What the environment says. Variables without a comment are set by the supervisor for the training process."""

    supervised: bool = False
    generation: int = 0
    shm_dir: Path | None = None
    coordinator: str | None = None
    coordinator_file: Path | None = None
    ray: str | None = None  # ARC_COORDINATOR=ray, for users: Ray's host:port, or auto; None: no Ray actor is used
    stand_in_s: float = 6.0  # ARC_STAND_IN_S, for users: silence of a Ray coordinator before rank 0 stands in for it
    token: str | None = None
    job_id: str = "local"  # ARC_JOB_ID, for users: the job's name; default: torchrun's
    job_named: bool = False  # whether ARC_JOB_ID was set
    plan: dict[str, Any] | None = None
    run_dir: Path = Path(".")  # ARC_RUN_DIR, for users: where incidents and events are written
    run_dir_named: bool = False  # whether ARC_RUN_DIR was set
    shm_root: Path = Path("/dev/shm")  # ARC_SHM_ROOT, for users: the memory file system that snapshots live in
    store: str | None = None  # ARC_STORE, for users: the default of Arc(store=...)
    log_level: str = "info"  # ARC_LOG_LEVEL, for users: debug, info, warning, error
    max_restarts: int = 100  # ARC_MAX_RESTARTS, for users: bound on restarts for infrastructure faults
    hang_deadline_s: float | None = None  # ARC_HANG_DEADLINE_S, for users: the default of Arc(hang_deadline_s=...)
    reentry_s: float = 5.0  # ARC_REENTRY_S, for users: the default of @resilient(within_s=...)
    grace_s: float = 30.0  # ARC_GRACE_S, for users: from a preemption notice to the end of all processes
    preempt_signals: tuple[int, ...] = (int(signal.SIGTERM),)  # ARC_PREEMPT_SIGNALS, for users: which are notices
    host_timeout_s: float = 15.0  # ARC_HOST_TIMEOUT_S, for users: silence after which a host is lost; 0 loses none
    min_nodes: int = 0  # ARC_MIN_NODES: the fewest nodes that the launcher allows; set by arcrun
    rendezvous: str | None = None  # ARC_RENDEZVOUS: host:port where the launcher's agents meet; set by arcrun
    spares: int = 0  # ARC_SPARES, for users: workers of the launcher that stand by instead of training
    spare_after_s: float = 15.0  # ARC_SPARE_AFTER_S, for users: patience with a silent rank before a spare replaces it
    evict: bool = False  # ARC_EVICT, for users: 1: suspected and slow hosts are left out at restarts
    preempt_file: Path | None = None  # ARC_PREEMPT_FILE, for users: a file whose appearance is a notice
    peer_copies: int | None = None  # ARC_PEER_COPIES, for users: of each sharded snapshot; None decides by the hosts
    peer_distance: int = 1  # ARC_PEER_DISTANCE, for users: failure domains from a rank's to that of its first copy
    peer_max_bytes_per_s: int | None = None  # ARC_PEER_MAX_BYTES_PER_S, for users: bound on sending copies, per rank
    failure_domain: str | None = None  # ARC_FAILURE_DOMAIN, for users: what is lost as a whole; default: the host
    has_peers: bool = False  # ARC_HAS_PEERS: this rank's snapshots are copied to other hosts
    tls_cert: Path | None = None  # ARC_TLS_CERT, for users: the certificate that the coordinator shows, PEM
    tls_key: Path | None = None  # ARC_TLS_KEY, for users: its key, PEM, without a passphrase
    tls_ca: Path | None = None  # ARC_TLS_CA, for users: who vouches for that certificate, PEM
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @staticmethod
    def read(environ: Mapping[str, str] | None = None) -> Env:
        """Reads `environ` (default: the process environment).

        Raises:
            ConfigError: a variable has a value that cannot be understood; the message names it.
        """
        env = os.environ if environ is None else environ
        job_id = env.get("ARC_JOB_ID") or env.get("TORCHELASTIC_RUN_ID") or "local"
        run_dir = env.get("ARC_RUN_DIR")
        plan = env.get("ARC_PLAN")
        try:
            parsed_plan = json.loads(plan) if plan else None
        except ValueError as error:
            raise ConfigError(f"ARC_PLAN is not JSON: {error}. It is set by the supervisor; unset it.") from error
        return Env(
            supervised=env.get("ARC_SUPERVISED") == "1",
            generation=_integer(env, "ARC_GENERATION", 0),
            shm_dir=_path(env, "ARC_SHM_DIR"),
            **_coordinator(env),
            coordinator_file=_path(env, "ARC_COORDINATOR_FILE"),
            stand_in_s=Env.stand_in_s if (stand_in_s := _seconds(env, "ARC_STAND_IN_S")) is None else stand_in_s,
            token=env.get("ARC_TOKEN") or None,
            job_id=job_id,
            job_named=bool(env.get("ARC_JOB_ID")),
            plan=parsed_plan,
            run_dir=Path(run_dir) if run_dir else default_run_dir(job_id),
            run_dir_named=bool(run_dir),
            shm_root=_path(env, "ARC_SHM_ROOT") or Path("/dev/shm"),
            store=env.get("ARC_STORE") or None,
            log_level=env.get("ARC_LOG_LEVEL", "info").lower(),
            max_restarts=_integer(env, "ARC_MAX_RESTARTS", 100),
            hang_deadline_s=_seconds(env, "ARC_HANG_DEADLINE_S"),
            reentry_s=Env.reentry_s if (reentry_s := _seconds(env, "ARC_REENTRY_S")) is None else reentry_s,
            grace_s=_grace(env),
            preempt_signals=_signals(env, "ARC_PREEMPT_SIGNALS", "SIGTERM"),
            host_timeout_s=_host_timeout(env),
            min_nodes=_integer(env, "ARC_MIN_NODES", 0),
            rendezvous=env.get("ARC_RENDEZVOUS") or None,
            spares=_integer(env, "ARC_SPARES", 0),
            spare_after_s=Env.spare_after_s if (after_s := _seconds(env, "ARC_SPARE_AFTER_S")) is None else after_s,
            evict=_switch(env, "ARC_EVICT"),
            preempt_file=_path(env, "ARC_PREEMPT_FILE"),
            peer_copies=_copies(env),
            peer_distance=_positive(env, "ARC_PEER_DISTANCE") or Env.peer_distance,
            peer_max_bytes_per_s=_positive(env, "ARC_PEER_MAX_BYTES_PER_S"),
            failure_domain=env.get("ARC_FAILURE_DOMAIN") or None,
            has_peers=env.get("ARC_HAS_PEERS") == "1",
            tls_cert=_path(env, "ARC_TLS_CERT"),
            tls_key=_path(env, "ARC_TLS_KEY"),
            tls_ca=_path(env, "ARC_TLS_CA"),
            rank=_integer(env, "RANK", 0),
            world_size=_integer(env, "WORLD_SIZE", 1),
            local_rank=_integer(env, "LOCAL_RANK", 0),
        )


def default_run_dir(job_id: str) -> Path:
    """Where a job's incidents go when nobody said: a private directory per user under the temporary directory."""
    return Path(tempfile.gettempdir()) / f"arc-dist-{getpass.getuser()}" / job_id


def _coordinator(env: Mapping[str, str]) -> dict[str, str | None]:
    """What ARC_COORDINATOR says: who is to host it (a user's word), or where it is (a supervisor's)."""
    text = env.get("ARC_COORDINATOR") or "embedded"
    scheme, colon, address = text.partition("://")
    if scheme in ("http", "https") and colon:
        return {"coordinator": text}
    if text == "embedded":
        return {}
    host, _, port = address.rpartition(":")
    if text == "ray" or (scheme == "ray" and host and port.isdigit() and 0 < int(port) < 1 << 16):
        return {"ray": address or "auto"}
    raise ConfigError(
        f"ARC_COORDINATOR={text!r} is none of embedded, ray and ray://HOST:PORT, where the port is that of Ray's "
        f"control service (ray start --port, 6379 by default). Correct or unset it.",
        variable="ARC_COORDINATOR",
    )


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number. Correct or unset it.", variable=name) from None
    if value < 0:
        raise ConfigError(f"{name}={text!r} must not be negative. Correct or unset it.", variable=name)
    return value


def _positive(env: Mapping[str, str], name: str) -> int | None:
    if not env.get(name):
        return None
    value = _integer(env, name, 0)
    if value == 0:
        raise ConfigError(f"{name}=0: must be 1 or more. Correct or unset it.", variable=name)
    return value


def _copies(env: Mapping[str, str]) -> int | None:
    name = "ARC_PEER_COPIES"
    return None if (env.get(name) or "auto").lower() == "auto" else _integer(env, name, 0)


def _switch(env: Mapping[str, str], name: str) -> bool:
    text = env.get(name) or "0"
    if text not in ("0", "1"):
        raise ConfigError(f"{name}={text!r} is neither 1 nor 0. Correct or unset it.", variable=name)
    return text == "1"


def _seconds(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name)
    if text is None or text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}={text!r} is not a number of seconds. Correct or unset it.", variable=name)
    return value


def _grace(env: Mapping[str, str]) -> float:
    seconds = _seconds(env, "ARC_GRACE_S")
    if seconds == 0:
        raise ConfigError("ARC_GRACE_S=0 leaves no time to save anything. Correct or unset it.", variable="ARC_GRACE_S")
    return Env.grace_s if seconds is None else seconds


def _host_timeout(env: Mapping[str, str]) -> float:
    seconds = _seconds(env, "ARC_HOST_TIMEOUT_S")
    if seconds is not None and 0 < seconds < _LEAST_HOST_TIMEOUT_S:
        raise ConfigError(
            f"ARC_HOST_TIMEOUT_S={seconds:g} would take a moment of a busy host for its loss. Set "
            f"{_LEAST_HOST_TIMEOUT_S:g} or more, or 0 for no limit.",
            variable="ARC_HOST_TIMEOUT_S",
        )
    return Env.host_timeout_s if seconds is None else seconds


_LEAST_HOST_TIMEOUT_S = 2.0
_NOTICE_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")  # handed on by supervisors, and not sent by people


def _signals(env: Mapping[str, str], name: str, default: str) -> tuple[int, ...]:
    words = [word.strip().upper() for word in (env.get(name) or default).split(",")]
    full = [word if word.startswith("SIG") else f"SIG{word}" for word in words]
    unknown = [word for word, known in zip(words, full, strict=True) if known not in _NOTICE_SIGNALS]
    if unknown:
        raise ConfigError(
            f"{name}={env.get(name)!r}: {', '.join(unknown)} cannot be a preemption notice. "
            f"Name one or more of {', '.join(_NOTICE_SIGNALS)}, separated by commas.",
            variable=name,
        )
    return tuple(dict.fromkeys(int(signal.Signals[known]) for known in full))


def _path(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    return Path(text) if text else None
