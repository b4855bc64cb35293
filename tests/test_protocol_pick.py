"""Which step all ranks restore: the examples of the design, and the laws."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from arc_dist.protocol.pick import Committed, Holding, Inventory, Known, Plan, Poison, Restored, Tier, pick


def held(step: int, slot: int = 0, generation: int = 0, **flags: bool) -> Holding:
    return Holding(step=step, slot=slot, generation=generation, **(flags or {"certified": True}))


def ranks(*holdings: tuple[Holding, ...], hosts: str = "") -> dict[int, Inventory]:
    return {
        rank: Inventory(host=hosts[rank] if hosts else "a", shm_dir=f"/shm/{rank}", holdings=entries)
        for rank, entries in enumerate(holdings)
    }


def test_the_newest_step_that_all_hold():
    plan = pick(1, ranks((held(10), held(12, 1)), (held(10, 1), held(8))), Known())
    assert (plan.step, plan.tier) == (10, Tier.MEMORY)
    assert [(source.rank, source.slot) for source in plan.sources.values()] == [(0, 0), (1, 1)]
    assert [(refusal.step, refusal.reason) for refusal in plan.refused] == [(12, "not held for rank 1")]


def test_what_is_not_certified_is_not_trusted_unless_it_is_a_parting_snapshot():
    uncertified = held(12, 1, certified=False)
    assert pick(1, ranks((held(10), uncertified), (held(10), uncertified)), Known()).step == 10
    parting = held(12, 1, parting=True)
    assert pick(1, ranks((held(10), parting), (held(10), parting)), Known()).step == 12


def test_a_replica_lends_its_step_to_a_rank_on_the_same_host():
    parting = held(12, 1, parting=True, replicated=True)
    plan = pick(1, ranks((held(10), parting), (held(10),)), Known())
    assert plan.step == 12
    assert plan.sources[1].rank == 0
    assert plan.sources[1].shm_dir == "/shm/0"
    assert "rank 1 from a peer" in plan.reason
    # Not over hosts, and not when the ranks hold different shards.
    assert pick(1, ranks((held(10), parting), (held(10),), hosts="ab"), Known()).step == 10
    sharded = held(12, 1, parting=True)
    assert pick(1, ranks((held(10), sharded), (held(10),)), Known()).step == 10


def test_lending_is_spread_over_the_peers():
    lender = held(12, replicated=True, certified=True)
    plan = pick(1, ranks((lender,), (lender,), (), ()), Known())
    assert {plan.sources[2].rank, plan.sources[3].rank} == {0, 1}


def test_poison_speaks_of_a_generation():
    known = Known(poison=(Poison(from_step=11, to_step=12, generation=1),))
    assert pick(2, ranks((held(10), held(12, 1, 1)), (held(10), held(12, 1, 1))), known).step == 10
    assert pick(3, ranks((held(10), held(12, 1, 2)), (held(10), held(12, 1, 2))), known).step == 12


def test_what_was_abandoned_does_not_return():
    known = Known(restored=(Restored(generation=2, step=10),))
    assert pick(3, ranks((held(10), held(12, 1, 1)), (held(10), held(12, 1, 1))), known).step == 10
    assert pick(3, ranks((held(10), held(12, 1, 2)), (held(10), held(12, 1, 2))), known).step == 12
    assert pick(3, ranks((held(12, 0, 1),), (held(12, 0, 2),)), known).tier is Tier.NONE


def test_memory_comes_before_disk_and_newer_before_older():
    disk = Known(committed=frozenset({Committed(step=10, url="s3://b", generation=0)}))
    assert pick(1, ranks((held(10),), (held(10),)), disk).tier is Tier.MEMORY
    assert pick(1, ranks((held(8),), (held(8),)), disk).tier is Tier.CHECKPOINT
    plan = pick(1, ranks((held(12),), ()), disk)
    assert (plan.tier, plan.step, plan.url, plan.saved_by) == (Tier.CHECKPOINT, 10, "s3://b", 0)
    assert pick(1, ranks((), ()), Known()).tier is Tier.NONE


def test_a_checkpoint_may_be_refused_too():
    entries = frozenset(
        {
            Committed(step=30, url="u", generation=0, certified=False),
            Committed(step=20, url="u", generation=0),
            Committed(step=10, url="u"),
        }
    )
    assert pick(1, ranks(()), Known(committed=entries)).step == 20
    poisoned = Known(committed=entries, poison=(Poison(from_step=15, to_step=25, generation=0),))
    plan = pick(1, ranks(()), poisoned)
    assert plan.step == 10
    assert [refusal.step for refusal in plan.refused] == [30, 20]
    unknown = Known(committed=entries, poison=(Poison(from_step=5, to_step=25, generation=0),))
    assert pick(1, ranks(()), unknown).tier is Tier.NONE  # who saved step 10 is not known: not trusted
    fresh = Known(committed=entries, restored=(Restored(generation=1, step=None),))
    assert pick(1, ranks(()), fresh).step == 20  # a start from nothing says nothing about the store
    older = Known(committed=entries, restored=(Restored(generation=1, step=10),))
    assert pick(1, ranks(()), older).step == 10


def test_of_two_saves_of_a_step_the_last_is_taken():
    entries = {Committed(step=10, url="u", generation=g) for g in (None, 0, 3)}
    assert pick(4, ranks(()), Known(committed=frozenset(entries))).saved_by == 3


def test_the_best_copy_of_a_rank_is_used():
    plan = pick(3, ranks((held(10, 0, 1), held(10, 1, 2), held(10, 2, 2, parting=True))), Known())
    assert plan.sources[0].slot == 1


def test_plans_travel():
    known = Known(
        poison=(Poison(from_step=1, to_step=2, generation=0),), committed=frozenset({Committed(step=10, url="u")})
    )
    for inventories in (ranks((held(12),), (held(12),)), ranks((held(12),), ())):
        plan = pick(1, inventories, known)
        assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_the_memory_of_poison_is_bounded_and_never_forgets():
    known = Known()
    for step in range(0, 2000, 2):
        known = known.with_poison(Poison(from_step=step, to_step=step, generation=0))
    assert len(known.poison) <= 256
    assert all(known.refusal(step, 0, in_memory=True) for step in range(0, 2000, 2))
    assert known.with_poison(known.poison[-1]) is known


# ---- laws

holdings = st.builds(
    Holding,
    step=st.integers(0, 6),
    slot=st.integers(0, 3),
    generation=st.integers(0, 3),
    certified=st.booleans(),
    parting=st.booleans(),
    replicated=st.booleans(),
)
inventories = st.lists(st.lists(holdings, max_size=4), min_size=1, max_size=4).flatmap(
    lambda lists: st.lists(st.sampled_from("ab"), min_size=len(lists), max_size=len(lists)).map(
        lambda hosts: ranks(*(tuple(entries) for entries in lists), hosts="".join(hosts))
    )
)
knowns = st.builds(
    Known,
    committed=st.frozensets(
        st.builds(
            Committed,
            step=st.integers(0, 6),
            url=st.sampled_from(["u", "v"]),
            generation=st.none() | st.integers(0, 3),
            certified=st.booleans(),
        ),
        max_size=3,
    ),
    poison=st.lists(
        st.builds(Poison, from_step=st.integers(0, 6), to_step=st.integers(0, 6), generation=st.integers(0, 3)),
        max_size=2,
    ).map(tuple),
    restored=st.lists(
        st.builds(Restored, generation=st.integers(1, 4), step=st.none() | st.integers(0, 6)), max_size=2
    ).map(tuple),
)


def newness(plan: Plan) -> int:
    return -1 if plan.step is None else plan.step


@settings(max_examples=400)
@given(inventories, knowns, st.data())
def test_law_one_more_snapshot_never_makes_the_plan_older(
    entries: dict[int, Inventory], known: Known, data: st.DataObject
):
    rank, extra = data.draw(st.sampled_from(sorted(entries))), data.draw(holdings)
    inventory = entries[rank]
    more = {**entries, rank: dataclasses.replace(inventory, holdings=(*inventory.holdings, extra))}
    assert newness(pick(4, more, known)) >= newness(pick(4, entries, known))


@settings(max_examples=400)
@given(inventories, knowns, st.randoms(use_true_random=False))
def test_law_neither_order_nor_repetition_matters(entries: dict[int, Inventory], known: Known, random):
    order = list(entries)
    random.shuffle(order)
    shuffled: dict[int, Inventory] = {}
    for rank in order:
        twice = list(entries[rank].holdings) * 2
        random.shuffle(twice)
        shuffled[rank] = dataclasses.replace(entries[rank], holdings=tuple(twice))
    assert pick(4, shuffled, known) == pick(4, entries, known)


@settings(max_examples=400)
@given(inventories, knowns)
def test_law_the_plan_is_sound(entries: dict[int, Inventory], known: Known):
    plan = pick(4, entries, known)
    if plan.tier is Tier.MEMORY:
        assert set(plan.sources) == set(entries)
        for rank, source in plan.sources.items():
            usable = [
                holding
                for holding in entries[source.rank].holdings
                if (holding.step, holding.slot) == (plan.step, source.slot)
                if holding.certified or holding.parting
                if known.refusal(holding.step, holding.generation, in_memory=True) is None
            ]
            assert usable
            if source.rank != rank:
                assert entries[rank].host == entries[source.rank].host
    assert all(refusal.step > newness(plan) for refusal in plan.refused)
    assert len(plan.refused) <= 8


@given(knowns, st.lists(st.builds(Restored, generation=st.integers(1, 6), step=st.none() | st.integers(0, 6))))
def test_law_shortening_what_was_restored_changes_no_refusal(known: Known, told: list[Restored]):
    told = sorted(told, key=lambda restored: restored.generation)
    short, long = Known(), Known(restored=tuple(told))
    for restored in told:
        short = short.with_restored(restored)
    for step in range(7):
        for generation in range(7):
            for in_memory in (True, False):
                told_short = short.refusal(step, generation, in_memory=in_memory)
                told_long = long.refusal(step, generation, in_memory=in_memory)
                assert (told_short is None) == (told_long is None)
