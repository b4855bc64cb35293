"""Random lives of a store, against a model of what must be there: two tiers, references, crashes, damage, marks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from arc_dist.checkpoint_store import pruning
from arc_dist.checkpoint_store.retention import Decision, Retention, StepFacts
from arc_dist.errors import StoreError
from store_model import Life, counted
from store_model_faults import TieredLife


class PlainLife(Life):
    """Without references, which would keep many steps from being pruned."""

    dedup = False


def live(
    scratch: Path,
    num_lives: int,
    num_steps: int,
    *,
    random_seed: bool,
    quick: bool = False,
    model: type[Life] = TieredLife,
) -> None:
    Life.scratch = scratch
    counted.clear()
    logging.getLogger("arc_dist.checkpoint_store.catalog").setLevel(logging.ERROR)  # it names every damaged step
    machine = settings(
        max_examples=num_lives,
        stateful_step_count=num_steps,
        deadline=None,
        derandomize=not random_seed,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if quick else [Phase.generate, Phase.shrink],
    )
    run_state_machine_as_test(model, settings=machine)


@pytest.mark.timeout(400)
def test_two_thousand_steps(shm_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(shm_root, 38, 80, random_seed=False)
    with capsys.disabled():
        print(f" {counted}", end="")
    assert counted["step"] >= 2000
    happened = {"save", "commit", "commit again", "killed", "damage", "prune", "restore", "fell back", "fenced"}
    happened |= {"pin", "quarantine", "referred", "copy", "restore from tiers"}
    assert not {what for what in happened if not counted.get(what)}, counted


@pytest.mark.soak
def test_a_hundred_thousand_steps(shm_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(shm_root, 1100, 100, random_seed=True)
    with capsys.disabled():
        print(f" {counted}", end="")
    assert counted["step"] >= 100_000


def test_the_model_finds_a_store_that_forgets(shm_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune that counts uncertified steps among those it keeps."""
    decide = pruning.decide

    def trusting(facts: Sequence[StepFacts], policy: Retention, now: float) -> dict[int, Decision]:
        return decide([dataclasses.replace(fact, certified=True) for fact in facts], policy, now)

    monkeypatch.setattr(pruning, "decide", trusting)
    with pytest.raises((AssertionError, StoreError)):
        live(shm_root, 40, 80, random_seed=False, quick=True, model=PlainLife)
