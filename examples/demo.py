"""The demonstration behind `make demo`: a real model, real faults, and a table of what became of them.

Trains the GPT of `train_gpt.py` on two ranks twice: once undisturbed (the twin), once while it meets a NaN on one rank
alone, a weight that turns to infinity, the SIGKILL of one rank and of both, the end of the whole job, and a flipped
byte in its newest checkpoint. Ends with each incident and its cost, and both models' loss on held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arc_dist.telemetry.report import read_lines, render, summarize

HERE = Path(__file__).resolve().parent
STEPS = 240
FAULTS = "nan_loss:1:40,inf_weight:0:80,sigkill:0:120,sigkill:0:160,sigkill:1:160"
NUM_FAULTS = 5
END_JOB_AT = 215
CHECKPOINT_EVERY = 50
TIMEOUT_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2 instead of replicating it")
    parser.add_argument("--keep", type=Path, help="work there and keep everything, instead of a temporary directory")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp(prefix="arc-demo-"))
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        ok = demonstrate(work, fsdp=args.fsdp)
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    print(f"\nthe demonstration took {time.monotonic() - began:.0f} s")
    return 0 if ok else 1


def demonstrate(work: Path, *, fsdp: bool) -> bool:
    say(f"the twin: {STEPS} steps on 2 ranks ({'FSDP2' if fsdp else 'DDP'}), undisturbed")
    finish(start(work, "twin", fsdp=fsdp, faults=""), "the twin")

    say(f"the same run with faults: {FAULTS}")
    job = start(work, "first", store="store", fsdp=fsdp, faults=FAULTS)
    follow_until(job, END_JOB_AT)
    say(f"the whole job is killed after step {END_JOB_AT}")
    kill_tree(job)

    damaged = flip_byte(newest_checkpoint(work / "store"))
    say(f"one byte of the newest checkpoint is flipped: {damaged.parent.name}/{damaged.name}")
    verify = subprocess.run([command("arc"), "verify", str(work / "store")], check=False)
    if verify.returncode == 0:
        raise SystemExit("arc verify did not find the flipped byte")

    say("the job is started again")
    finish(start(work, "second", store="store", fsdp=fsdp, faults=FAULTS), "the run with faults")
    return report(work)


def say(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def command(name: str) -> str:
    """A console script of this environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def start(work: Path, name: str, *, fsdp: bool, faults: str, store: str | None = None) -> subprocess.Popen[str]:
    script = [str(HERE / "train_gpt.py"), "--steps", str(STEPS), "--checkpoint-every", str(CHECKPOINT_EVERY)]
    script += ["--faults", faults, "--faults-dir", str(work / "faults"), "--result", str(work / f"{name}.json")]
    script += ["--store", str(work / (store or f"store-{name}"))] + (["--fsdp"] if fsdp else [])
    env = {**os.environ, "ARC_RUN_DIR": str(work / f"run-{name}"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [command("arcrun"), "--standalone", "--nproc-per-node=2", *script],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str], what: str) -> None:
    assert job.stdout is not None
    deadline = time.monotonic() + TIMEOUT_S
    for line in job.stdout:
        print(line, end="", flush=True)
        if time.monotonic() > deadline:
            kill_tree(job)
            raise SystemExit(f"{what} did not end within {TIMEOUT_S:.0f} s")
    if job.wait() != 0:
        raise SystemExit(f"{what} ended with exit code {job.returncode}")


def follow_until(job: subprocess.Popen[str], step: int) -> None:
    """Prints the job's output until it has passed `step`."""
    assert job.stdout is not None
    for line in job.stdout:
        print(line, end="", flush=True)
        match = re.match(r"step +(\d+)/", line)
        if match and int(match[1]) >= step:
            return
    raise SystemExit(f"the job ended before step {step} with exit code {job.wait()}")


def kill_tree(job: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher and everything below it, as when a machine's power goes."""
    for pid in [job.pid, *descendants(job.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it went with its parent
    job.wait()


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        parents[int(status.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def newest_checkpoint(store: Path) -> Path:
    manifests = sorted(store.glob("*/step-*/manifest.json"), key=lambda path: path.parent.name)
    if len(manifests) < 2:
        raise SystemExit(f"{store} should hold two committed checkpoints by now, it holds {len(manifests)}")
    return manifests[-1].parent


def flip_byte(step_directory: Path) -> Path:
    """Inverts one byte in the middle of the largest file."""
    path = max(step_directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))
    return path


def report(work: Path) -> bool:
    struck = sorted((work / "faults").glob("*.json"))
    lines = read_lines(work / "run-first") + read_lines(work / "run-second")
    say("what happened")
    print(render(summarize(lines)))
    losses = {name: json.loads((work / f"{name}.json").read_text())["held_out_loss"] for name in ("twin", "second")}
    difference = losses["second"] / losses["twin"] - 1
    print(f"\nfaults that struck: {len(struck)} of {NUM_FAULTS}")
    print(f"held-out loss: {losses['second']:.4f} with faults, {losses['twin']:.4f} without ({difference:+.2%})")
    return len(struck) == NUM_FAULTS and abs(difference) < 0.05


if __name__ == "__main__":
    sys.exit(main())
