"""Trains a small byte-level GPT with Ray Train, protected by arc-dist.

::

    pip install 'arc-dist[ray]'
    python examples/ray_train.py --steps 40
    python examples/ray_train.py --steps 40 --out /tmp/killed --kill-at 20

Ray starts the workers, and starts all of them again when one dies; Arc, in the new workers, finds the newest whole
step in the store and goes on at the exact sample. The training itself, `train`, knows nothing of Ray.

Thin: the workers have no supervisor of ours, so after a death all of them begin anew from the store, in the seconds
that Ray needs, and the steps since the last checkpoint are done again. docs/ray.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from arc_dist import Arc, SeededSampler, Store
from faults import Fault, FaultScript
from gpt import GPT, GPTConfig, StdlibText, make_optimizer, next_byte_loss

MODEL = GPTConfig(context=32, layers=2, heads=2, width=64)
MAX_GRAD_NORM = 1.0
KILL_WAIT_S = 60.0  # how long a worker that is to be killed waits for the first checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the workers are told."""

    out: str  # a directory that all workers see
    store: str
    steps: int = 40
    batch: int = 4  # windows per worker and step
    checkpoint_every: int = 5
    kill_at: int | None = None
    kill_rank: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What is trained, and on what."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]


def build(job: Job) -> Parts:
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT(MODEL))
    optimizer = make_optimizer(model)
    data = StdlibText(MODEL.context, max_bytes=1 << 18)
    return Parts(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10)),
        loader=DataLoader(data, batch_size=job.batch, sampler=SeededSampler(data, seed=1), drop_last=True),
    )


def train(job: Job) -> None:
    """What every worker runs, in a process group that exists. It does not care how often it was started before."""
    started_at = time.time()
    rank = dist.get_rank()
    out = Path(job.out)
    parts = build(job)
    faults = FaultScript(planned_faults(job), rank, out / "faults")
    arc = Arc(
        parts.model,
        parts.optimizer,
        scheduler=parts.scheduler,
        store=job.store,
        max_grad_norm=MAX_GRAD_NORM,
        checkpoint_every=job.checkpoint_every,
    )

    def loss_fn(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        step = arc.steps_done + 1
        if step == job.kill_at and rank == job.kill_rank:
            wait_for_a_checkpoint(job.store)
        return faults.on_loss(next_byte_loss(parts.model, batch), step)

    first_step = last_step = None
    for step in arc.train(loss_fn, parts.loader, steps=job.steps):
        last_step = step.number
        if first_step is None:
            first_step = step.number
            if rank == 0:
                note(out / "attempts.jsonl", pid=os.getpid(), started_at=started_at, first_step=first_step)
        if rank == 0 and step.number % 10 == 0:
            print(f"step {step.number:4d}/{job.steps}  loss {step.loss:.4f}", flush=True)

    result = {"last_step": last_step, "digest": weights_digest(parts.model)}
    (out / f"result-{rank}.json").write_text(json.dumps(result))


def note(path: Path, **fields: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights: equal for equal bits."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def planned_faults(job: Job) -> list[Fault]:
    return [] if job.kill_at is None else [Fault(kind="sigkill", rank=job.kill_rank, step=job.kill_at)]


def wait_for_a_checkpoint(url: str) -> None:
    """So that the kill shows something: checkpoints are written in the background, and these steps are very short."""
    deadline_s = time.monotonic() + KILL_WAIT_S
    while not Store(url).steps() and time.monotonic() < deadline_s:
        time.sleep(0.05)


# ---------------------------------------------------------------------- the part that knows Ray


def train_loop(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker, after it has made the process group."""
    train(Job(**config))


def main() -> None:
    args = parse_arguments()
    prepare_environment(local=args.address == "local")
    # Ray Train reads the environment when it is imported.
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    store = args.store if args.store and "://" in args.store else str(Path(args.store or out / "store").absolute())
    job = Job(
        out=str(out),
        store=store,
        steps=args.steps,
        batch=args.batch,
        checkpoint_every=args.checkpoint_every,
        kill_at=args.kill_at,
        kill_rank=args.kill_rank,
    )
    if args.address == "local":
        ray.init(address="local", num_cpus=args.workers, include_dashboard=False, object_store_memory=128 << 20)
    else:
        ray.init(address=args.address)
    try:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config=dataclasses.asdict(job),
            torch_config=TorchConfig(backend="gloo", timeout_s=120),
            scaling_config=ScalingConfig(num_workers=args.workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="arc-dist",
                storage_path=str(out / "ray"),
                failure_config=FailureConfig(max_failures=args.max_failures),
            ),
        )
        trainer.fit()
    finally:
        ray.shutdown()
    report(job, args.workers)


def prepare_environment(*, local: bool) -> None:
    """Settings that Ray and its Train library take from the environment; what is set already is left alone."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # older versions of Ray start the first Train otherwise
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a death is seen
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # with it, every printed line comes twice
    if local and "RAY_AUTH_MODE" not in os.environ:
        # A token of this run's own, in memory: Ray would otherwise keep one in a file for all later clusters.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def report(job: Job, workers: int) -> None:
    """What happened, from the files that the workers left."""
    out = Path(job.out)
    attempts = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    results = [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(workers)]
    for number, attempt in enumerate(attempts, 1):
        print(f"attempt {number} began with step {attempt['first_step']}")
    digests = {result["digest"] for result in results}
    last_step = results[0]["last_step"]
    print(f"step {last_step} reached" if last_step else f"step {job.steps} had been reached before")
    print(f"weights {' '.join(sorted(digests))}", flush=True)
    if len(digests) != 1:
        sys.exit("the workers ended with different weights")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=Job.steps, help="updates in the whole run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=Job.batch, help="windows per worker and step")
    parser.add_argument("--out", type=Path, default=Path("ray-train"), help="directory for all that is written")
    parser.add_argument("--store", help="directory or URL for checkpoints (default: OUT/store)")
    parser.add_argument("--checkpoint-every", type=int, default=Job.checkpoint_every)
    parser.add_argument("--max-failures", type=int, default=3, help="how often Ray starts the workers again")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="one worker kills itself there, once")
    parser.add_argument("--kill-rank", type=int, default=Job.kill_rank, help="which worker does")
    parser.add_argument("--address", default="local", help="of a Ray cluster; default: one of its own, on this machine")
    return parser.parse_args()


if __name__ == "__main__":
    main()
