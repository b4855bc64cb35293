"""Random faults strike live jobs of four ranks; see chaos.py. A failure prints the seed and all that happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import WORLD_SIZE, Fault, Plan, make_plan, run
from ranks import run_ranks
from toy import Toy, plain

pytestmark = pytest.mark.slow

LIMIT_S = 600.0
SOAK_FAULTS = 1000
FAULTS_PER_JOB = 14
HEAVY = ((), ("supervisor",), ("zygote",), ("agent",), ("agent", "supervisor"))


def undisturbed_rank(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


def check(plan: Plan, tmp_path: Path, shm_root: Path) -> None:
    undisturbed = run_ranks(WORLD_SIZE, undisturbed_rank, plan.toy)
    run(plan, tmp_path, shm_root=shm_root, limit_s=LIMIT_S).check(undisturbed)


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    ("seed", "num_faults", "heavy"),
    [(25, 14, ("agent", "supervisor")), (26, 13, ()), (31, 13, ("zygote",))],
    ids=["seed25", "seed26", "seed31"],
)
def test_forty_random_faults_change_no_bit(
    seed: int, num_faults: int, heavy: tuple[str, ...], tmp_path: Path, shm_root: Path
) -> None:
    check(make_plan(seed, num_faults=num_faults, heavy=heavy), tmp_path, shm_root)


@pytest.mark.timeout(LIMIT_S + 60)
def test_ranks_that_fail_before_and_after_a_collective_was_begun_go_on_alike(tmp_path: Path, shm_root: Path) -> None:
    """Rank 3 fails in the step whose mean loss is due, before it sent its part; the others had. They met no more."""
    fault = Fault(number=0, kind="raise", by=3, place="loss", step=9, ranks=(3,))
    check(Plan(seed=0, toy=Toy(kind="ddp", steps=14), faults=(fault,)), tmp_path, shm_root)


@pytest.mark.soak
@pytest.mark.timeout(10 * 3600)
def test_a_thousand_random_faults(tmp_path: Path, shm_root: Path) -> None:
    for seed in range(100, 100 + SOAK_FAULTS // FAULTS_PER_JOB + 1):
        plan = make_plan(seed, num_faults=FAULTS_PER_JOB, heavy=HEAVY[seed % len(HEAVY)])
        check(plan, tmp_path / str(seed), shm_root)
        print(f"seed {seed}: {len(plan.faults)} faults", flush=True)
