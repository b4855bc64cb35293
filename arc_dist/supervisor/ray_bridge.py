"""``python -m arc_dist.supervisor.ray_bridge``: the one process of a node that is connected to Ray.

Ray ends processes that are connected to it when its control service is lost, so this one can be ended at any time: it
holds nothing, and whoever started it (`ray_link`) starts another. It reads lines of JSON and writes lines of JSON.

In: first an order, ``{"do", "job_id", "address", "parent", ...}``; later ``{"do": "stop"}``, which ends the actor. The
end of the input ends the process.

=========  =============================================================================================================
do         what it does
=========  =============================================================================================================
host       starts or finds the actor, tells it what to serve (``spec``) again and again, and reports its endpoint
follow     finds the actor, asks it where it is again and again, and reports that
start      starts the actor, or finds it (``idle_limit_s``); reports and ends
status     describes the actors of one job or of all; reports and ends
stop       ends the actor; reports and ends
=========  =============================================================================================================

Out: ``{"connected": true}`` once; ``{"endpoint": ...}`` when it has changed; ``{"problem": text, "is_final": bool}``
when it has changed, final when trying again is of no use; ``{"done": ...}`` as the last line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from arc_dist.coordinator import ray_actor
from arc_dist.supervisor import process

_HEALTHY_S = 0.5  # between two questions
_FAILING_S = 0.1
_CALL_S = 5.0
_FROZEN_S = 30.0  # an actor that answers nothing for so long is killed, and Ray starts it again
_PROBE_S = 3.0
_CONNECT_S = 45.0  # Ray itself goes on trying for minutes, and says nothing
_GONE = 3


class Bridge:
    """One order, carried out.

    Args:
        order: see the module's text.
        report: writes a line to who gave it.
    """

    def __init__(self, order: Mapping[str, Any], report: Reports) -> None:
        self._order = order
        self._job_id = str(order.get("job_id") or "")
        self._report = report
        self._stopping = threading.Event()
        self._ray: Any = None
        self._actor: Any = None
        self._own_node = ""
        self._is_moved_here = False

    def stop(self) -> None:
        """Ends the loop; called from another thread."""
        self._stopping.set()

    def run(self) -> None:
        """Connects, and does what the order says."""
        self._connect()
        self._report.line({"connected": True})
        match self._order["do"]:
            case "host" | "follow":
                self._keep()
                if self._order["do"] == "host":
                    self._report.line({"done": {"ended": ray_actor.end_actor(self._job_id)}})
            case "start":
                self._actor = self._start(float(self._order["idle_limit_s"]))
                self._report.line({"done": self._ray.get(self._actor.about.remote(), timeout=60.0)})
            case "status":
                self._report.line({"done": self._describe()})
            case "stop":
                self._report.line({"done": {"ended": ray_actor.end_actor(self._job_id)}})
            case other:
                raise ValueError(f"no such order: {other}")

    # ---- connecting

    def _connect(self) -> None:
        if importlib.util.find_spec("ray") is None:
            self._report.fail("Ray is not installed on this node. Install it with: pip install 'arc-dist[ray]'")
        address = str(self._order.get("address") or "auto")
        if address != "auto":
            self._probe(address)
        # Ray refuses another patch level of Python, which its own protocol does not mind, unless told so.
        os.environ.setdefault("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
        # Never left to a default, which depends on the version and may write a token file into the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self._ray = importlib.import_module("ray")
        slow = threading.Timer(_CONNECT_S, self._say_slow, [address])
        slow.daemon = True
        slow.start()
        try:
            self._ray.init(address=address, namespace=ray_actor.NAMESPACE, log_to_driver=False, configure_logging=False)
        except Exception as error:  # noqa: BLE001  # Ray raises what its parts happen to raise; all of it is reported
            self._explain(address, error)
        finally:
            slow.cancel()
        self._own_node = self._ray.get_runtime_context().get_node_id()

    def _probe(self, address: str) -> None:
        """Says at once what Ray would say after a minute."""
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
        except OSError as error:
            self._report.fail(
                f"Ray's control service at {address} is not reached: {error}. Start Ray, or correct ray://HOST:PORT.",
                is_final=False,
            )

    def _say_slow(self, address: str) -> None:
        text = f"Ray at {address} has not let this node connect for {_CONNECT_S:.0f} s. Look at ray status."
        self._report.line({"problem": text, "is_final": False})

    def _explain(self, address: str, error: Exception) -> NoReturn:
        text = " ".join(str(error).split())
        if "ersion mismatch" in text:
            self._report.fail(
                f"the Ray cluster at {address} was started with other versions than this node has: {text}. Install the "
                f"cluster's versions of Ray and Python here, or use --coordinator=embedded."
            )
        if "uthentication" in text or "UNAUTHENTICATED" in text:
            self._report.fail(
                f"the Ray cluster at {address} refuses this node's credentials (RAY_AUTH_MODE="
                f"{os.environ['RAY_AUTH_MODE']}): {text}. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
                f"RAY_AUTH_TOKEN_PATH as on the cluster."
            )
        self._report.fail(f"Ray is not reached at {address}: {text}. Start Ray on this node.", is_final=False)

    # ---- the actor

    def _keep(self) -> None:
        """Asks the actor again and again; one that is lost is found again, or started."""
        heard_at = time.monotonic()
        while not self._stopping.is_set():
            try:
                answer = self._ask()
            except self._ray.exceptions.GetTimeoutError:
                answer = {"problem": f"the actor has not answered for {time.monotonic() - heard_at:.0f} s"}
                if time.monotonic() - heard_at > _FROZEN_S and self._order["do"] == "host":
                    self._ray.kill(self._actor, no_restart=False)
                    heard_at = time.monotonic()
            except self._ray.exceptions.ActorUnavailableError as error:
                answer = {"problem": f"Ray restarts the actor: {_first_line(error)}"}
            except self._ray.exceptions.RayActorError as error:
                self._actor = None
                answer = {"problem": f"the actor has ended: {_first_line(error)}"}
                if "No module named" in str(error):
                    self._report.fail(
                        f"arc_dist cannot be imported on the Ray cluster: {_first_line(error)}. Install arc-dist on "
                        f"all of its nodes."
                    )
            else:
                heard_at = time.monotonic()
            self._take(answer)
            self._stopping.wait(_HEALTHY_S if "endpoint" in answer else _FAILING_S)

    def _ask(self) -> dict[str, Any]:
        is_host = self._order["do"] == "host"
        if self._actor is None:
            self._actor = self._start() if is_host else ray_actor.find_actor(self._job_id)
        if self._actor is None:
            return {"problem": f"Ray has no coordinator for job {self._job_id!r}", "kind": "waiting"}
        if is_host:
            return self._ray.get(self._actor.serve.remote(self._order["spec"]), timeout=_CALL_S)
        return self._ray.get(self._actor.endpoint.remote(), timeout=_CALL_S)

    def _start(self, idle_limit_s: float = ray_actor.IDLE_LIMIT_S) -> Any:
        node = self._own_node if self._is_moved_here else ray_actor.choose_node(self._own_node)
        return ray_actor.create_actor(self._job_id, node, idle_limit_s)

    def _take(self, answer: Mapping[str, Any]) -> None:
        if "endpoint" in answer:
            self._report.line({"endpoint": answer["endpoint"]})
            return
        kind = answer.get("kind")
        if kind == "deposed" or (kind == "place" and self._is_moved_here):
            self._report.fail(answer["problem"])
        if kind == "place":
            # A run directory that only this node has: then the actor has to be here, too.
            self._is_moved_here = True
            ray_actor.end_actor(self._job_id)
            self._actor = None
        self._report.line({"problem": answer["problem"], "is_final": False})

    def _describe(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for entry in self._ray.util.list_named_actors(all_namespaces=True):
            job_id = ray_actor.job_of(entry["name"]) if entry["namespace"] == ray_actor.NAMESPACE else None
            if job_id is None or (self._job_id and job_id != self._job_id):
                continue
            try:
                actor = self._ray.get_actor(entry["name"], namespace=ray_actor.NAMESPACE)
                found.append({**self._ray.get(actor.about.remote(), timeout=_CALL_S), "state": "answers"})
            except (ValueError, self._ray.exceptions.RayError) as error:
                found.append({"job_id": job_id, "state": f"does not answer: {_first_line(error)}"})
        return found


class Reports:
    """Writes lines to who started this process; the same line twice in a row is written once."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._last = ""
        self._guard = threading.Lock()

    def line(self, fields: Mapping[str, Any]) -> None:
        """Writes one; ends the process when nobody reads any more."""
        text = json.dumps(fields)
        with self._guard:
            if text == self._last:
                return
            self._last = text
            try:
                self._file.write(text + "\n")
                self._file.flush()
            except OSError:
                os._exit(_GONE)

    def fail(self, problem: str, *, is_final: bool = True) -> NoReturn:
        """Reports what makes going on impossible, and ends the process."""
        self.line({"problem": problem, "is_final": is_final})
        os._exit(1)


def main() -> None:
    """Entry point; see the module's text."""
    # What Ray and its libraries print is no report of ours.
    reports = Reports(os.dup(1))
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    process.die_with_parent(int(order["parent"]))
    bridge = Bridge(order, reports)

    def listen() -> None:
        for line in sys.stdin:
            if json.loads(line).get("do") == "stop":
                bridge.stop()
        os._exit(0)

    threading.Thread(target=listen, name="arc-listen", daemon=True).start()
    try:
        bridge.run()
    except Exception as error:  # noqa: BLE001  # whatever it is, another bridge is started; this one says why
        reports.fail(f"{type(error).__name__}: {_first_line(error)}", is_final=False)
    # Without the interpreter's own end, in which Ray waits for its services.
    os._exit(0)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines and len(lines[0]) > 200 else (lines[0] if lines else type(error).__name__)


if __name__ == "__main__":
    main()
