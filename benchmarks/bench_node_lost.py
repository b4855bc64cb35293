"""From the loss of one of three nodes to the next step of the two that are left: ours, and torchrun's own elasticity.

Each node is a network namespace with an agent of its own (one rank; an MLP of 94K parameters under DDP, gloo, one
thread). The lost node's processes are killed while its network lives, so that the others hear of it at once: without a
word (`--silent`) plain torchrun waits for the time-out of the process group. Its arm has a `last_call_timeout` of one
second instead of the usual 30. Both arms run in turn. Needs root.

    python benchmarks/bench_node_lost.py --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import netns
from ranks import Job
from stats import setting

SCRIPT = Path(__file__).with_name("node_lost_job.py")
NUM_NODES = 3
PORT = 29400
LIMIT_S = 240.0
SETTLED_STEPS = 40


def command(arm: str, network: netns.Network, node: int, directory: Path, host_timeout_s: float) -> list[str]:
    """What starts a node of this arm."""
    module = "arc_dist.launch.arcrun" if arm == "arc" else "torch.distributed.run"
    conf = f"is_host={int(node == 0)},join_timeout=300" + (",last_call_timeout=1" if arm == "torchrun" else "")
    nodes = f"--nnodes=1:{NUM_NODES}" if arm == "arc" else f"--nnodes=2:{NUM_NODES}"
    return [
        sys.executable, "-m", module, nodes, "--nproc-per-node=1", "--max-restarts=5", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={network.address(0)}:{PORT}", "--rdzv-id=bench", f"--local-addr={network.address(node)}",
        f"--rdzv-conf={conf}", "--monitor-interval=0.1",
        *([f"--arc-host-timeout-s={host_timeout_s}"] if arm == "arc" else []), str(SCRIPT), arm, str(directory),
    ]  # fmt: skip


def steps(directory: Path) -> list[tuple[float, int]]:
    """(seconds, world size) of every committed step."""
    path = directory / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((int(line.split()[0]) / 1e9, int(line.split()[2])) for line in lines)


def declared_at(directory: Path) -> float | None:
    """When the node was declared lost, in seconds since 1970."""
    path = directory / "run" / "incidents.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((line["time"] for line in lines if line["kind"] == "world_shrinks"), None)


def measure(arm: str, silent: bool, host_timeout_s: float) -> tuple[float, float | None]:
    """Seconds from the loss to the next step, and from its declaration."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-node-")))
        network = stack.enter_context(netns.Network(NUM_NODES))
        env = {"ARC_RUN_DIR": str(directory / "run"), "OMP_NUM_THREADS": "1"}
        if arm == "torchrun":
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # arcrun sets it too
        jobs: list[Job] = []
        for node in range(NUM_NODES):
            job = network.start(node, command(arm, network, node, directory, host_timeout_s), env=env)
            jobs.append(stack.enter_context(job))

        def has_settled() -> bool:
            worlds = [world for _, world in steps(directory)][-SETTLED_STEPS:]
            return worlds == [NUM_NODES] * SETTLED_STEPS

        jobs[0].wait_for(has_settled, LIMIT_S, "steps of three nodes")
        offset_s = time.time() - time.monotonic()
        lost_at = time.monotonic()
        if silent:
            network.cut(NUM_NODES - 1)
        jobs[NUM_NODES - 1].kill()
        jobs[0].wait_for(lambda: steps(directory)[-1][1] == NUM_NODES - 1, LIMIT_S, "steps of two nodes")
        resumed_at = next(at for at, world in steps(directory) if world == NUM_NODES - 1)
        declared = declared_at(directory)
        return resumed_at - lost_at, None if declared is None else resumed_at - (declared - offset_s)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--silent", action="store_true", help="the lost node says nothing; ours alone")
    parser.add_argument("--host-timeout-s", type=float, default=15.0)
    arguments = parser.parse_args()
    if problem := netns.problem():
        sys.exit(problem)
    print(setting())
    print(
        f"{NUM_NODES} nodes x 1 rank, 94K parameters, DDP, gloo, 1 thread; host time-out {arguments.host_timeout_s} s"
    )
    totals: dict[str, list[float]] = {"arc": [], "torchrun": []}
    since_declared: list[float] = []
    for _ in range(arguments.rounds):
        for arm in ("arc",) if arguments.silent else ("arc", "torchrun"):
            total_s, declared_s = measure(arm, arguments.silent, arguments.host_timeout_s)
            totals[arm].append(total_s)
            if declared_s is not None:
                since_declared.append(declared_s)
            after = "" if declared_s is None else f", {declared_s:.2f} s after it was declared lost"
            print(f"{arm:9} {total_s:6.2f} s from the loss to the next step{after}", flush=True)
    medians = {arm: statistics.median(values) for arm, values in totals.items() if values}
    print("medians:", ", ".join(f"{arm} {value:.2f} s" for arm, value in medians.items()))
    print(f"declared lost -> next step: median {statistics.median(since_declared):.2f} s")
    if len(medians) == 2:
        print(f"ratio torchrun / arc: {medians['torchrun'] / medians['arc']:.1f}")


if __name__ == "__main__":
    main()
