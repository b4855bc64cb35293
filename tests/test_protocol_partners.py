"""Who keeps whose copies: never the rank itself, never its own failure domain, and nobody more than their share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.partners import AUTO, partners

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def domains_of(sizes: list[int]) -> list[str]:
    return [f"h{number}" for number, size in enumerate(sizes) for _ in range(size)]


def everyone(domains: list[str], copies: int, distance: int = 1) -> tuple[tuple[int, ...], ...]:
    return partners(domains, [(copies, distance)] * len(domains))


def test_the_next_host_keeps_them_rank_by_rank():
    assert everyone(["a", "a", "b", "b", "c", "c"], AUTO) == ((2,), (3,), (4,), (5,), (0,), (1,))
    assert everyone(["a", "a", "b", "b", "c", "c"], 1, distance=2) == ((4,), (5,), (0,), (1,), (2,), (3,))
    assert everyone(["a", "b", "c"], 2) == ((1, 2), (2, 0), (0, 1))


def test_ranks_of_a_domain_need_not_be_neighbours():
    assert everyone(["a", "b", "a", "b"], AUTO) == ((1,), (0,), (3,), (2,))


def test_one_domain_makes_no_copies_unless_they_are_asked_for():
    assert everyone(["a", "a", "a"], AUTO) == ((), (), ())
    assert everyone(["a", "a", "a"], 1) == ((1,), (2,), (0,))
    assert everyone(["a"], 3) == ((),)


def test_a_distance_all_round_the_circle_comes_to_the_next_domain_not_to_itself():
    assert everyone(["a", "b"], 1, distance=2) == ((1,), (0,))


def test_none_is_none():
    assert everyone(["a", "b"], 0) == ((), ())


@pytest.mark.parametrize(("copies", "distance"), [(-2, 1), (1, 0)])
def test_what_cannot_be_meant_is_refused(copies, distance):
    with pytest.raises(ValueError, match="copies="):
        everyone(["a", "b"], copies, distance)


@given(SIZES, st.integers(0, 6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_copies_are_elsewhere_and_in_different_domains(sizes, copies, distance, random):
    domains = domains_of(sizes)
    random.shuffle(domains)
    for rank, chosen in enumerate(everyone(domains, copies, distance)):
        assert rank not in chosen
        if len(sizes) > 1:
            assert domains[rank] not in {domains[other] for other in chosen}
            assert len(chosen) == len({domains[other] for other in chosen}) == min(copies, len(sizes) - 1)
        else:
            assert len(chosen) == len(set(chosen)) == min(copies, len(domains) - 1)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(0, 7), st.integers(1, 9))
def test_hosts_of_one_size_share_the_load_exactly(hosts, ranks, copies, distance):
    table = everyone(domains_of([ranks] * hosts), copies, distance)
    load = [sum(rank in chosen for chosen in table) for rank in range(hosts * ranks)]
    assert set(load) == {min(copies, hosts - 1)}


@given(SIZES.filter(lambda sizes: len(sizes) > 1), st.integers(1, 6), st.integers(1, 9))
def test_no_rank_of_uneven_hosts_keeps_more_than_its_share_of_each_giver(sizes, copies, distance):
    domains = domains_of(sizes)
    table = everyone(domains, copies, distance)
    for rank, domain in enumerate(domains):
        for giver in set(domains) - {domain}:
            load = sum(rank in table[owner] for owner in range(len(domains)) if domains[owner] == giver)
            assert load <= -(-domains.count(giver) // domains.count(domain))


@given(SIZES.filter(lambda sizes: len(sizes) > 1), st.integers(1, 9))
def test_any_one_domain_may_be_lost(sizes, distance):
    domains = domains_of(sizes)
    table = everyone(domains, AUTO, distance)
    for lost in set(domains):
        for owner, domain in enumerate(domains):
            if domain == lost:
                assert any(domains[keeper] != lost for keeper in table[owner])
