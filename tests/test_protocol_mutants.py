"""The simulator and the exhaustive search find bugs: each of these is put in on purpose."""

from __future__ import annotations

import pytest

from protocol_mutants import MUTANTS, found_by, honest


def test_the_aimed_schedules_find_nothing_in_the_honest_code():
    aimed = {mutant.faults: (name, mutant) for name, mutant in MUTANTS.items() if mutant.faults}
    assert not {name: problem for name, mutant in aimed.values() if (problem := honest(mutant))}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_is_found(name: str):
    assert found_by(MUTANTS[name], num_seeds=150), f"nobody noticed: {name}"
