"""The simulator and the exhaustive search find bugs: each of these is put in on purpose."""

from __future__ import annotations

import pytest

from protocol_mutants import MUTANTS, found_by

QUICK = [name for name, mutant in MUTANTS.items() if not mutant.slow]


def test_there_are_enough():
    assert len(MUTANTS) >= 30
    assert len(QUICK) >= 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", QUICK)
def test_a_bug_is_found(name: str):
    assert found_by(MUTANTS[name], num_seeds=150), f"nobody noticed: {name}"


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICK])
def test_a_rare_bug_is_found(name: str):
    assert found_by(MUTANTS[name], num_seeds=20_000), f"nobody noticed: {name}"
