"""Which step all ranks restore: the examples of the design, and the laws."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_dist.protocol.pick import Committed, Known, Plan, Poison, Restored, Tier, pick
from arc_dist.protocol.sources import Copy, Holding, Inventory, Source, replica_keys

KEY = 77


def held(step: int, slot: int = 0, generation: int = 0, **flags: Any) -> Holding:
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
    parting, older = held(12, 1, parting=True, replica_key=KEY), held(10, certified=True, replica_key=KEY)
    plan = pick(1, ranks((older, parting), (older,)), Known())
    assert plan.step == 12
    assert plan.sources[1].rank == 0
    assert plan.sources[1].shm_dir == "/shm/0"
    assert "rank 1 from a peer" in plan.reason
    # Not over hosts (where nothing is exchanged), and not when the ranks hold different shards, or nobody knows which.
    assert pick(1, ranks((older, parting), (older,), hosts="ab"), Known()).step == 10
    other = held(10, certified=True, replica_key=KEY + 1)
    assert pick(1, ranks((older, parting), (other,)), Known()).step == 10
    assert pick(1, ranks((held(10), parting), (held(10),)), Known()).step == 10
    sharded = held(12, 1, parting=True)
    assert pick(1, ranks((held(10), sharded), (held(10),)), Known()).step == 10
    assert pick(1, ranks((older, parting), ()), Known()).tier is Tier.NONE


def test_under_hsdp_each_shard_has_replicas_of_its_own():
    shards = [KEY, KEY + 1, KEY, KEY + 1]
    old = [held(10, certified=True, replica_key=key) for key in shards]
    new = [held(12, 1, parting=True, replica_key=key) for key in shards]
    plan = pick(1, ranks((old[0], new[0]), (old[1], new[1]), (old[2], new[2]), (old[3],)), Known())
    assert (plan.step, [source.rank for source in plan.sources.values()]) == (12, [0, 1, 2, 1])
    plan = pick(1, ranks((old[0], new[0]), (old[1],), (old[2], new[2]), (old[3],)), Known())
    assert (plan.step, plan.refused[0].reason) == (10, "not held for ranks 1, 3")


def test_lending_is_spread_over_the_peers():
    lender = held(12, replica_key=KEY, certified=True)
    older = held(10, certified=True, replica_key=KEY)
    plan = pick(1, ranks((lender,), (lender,), (older,), (older,)), Known())
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


def copies(inventories: dict[int, Inventory], holder: int, *of: tuple[int, Holding]) -> dict[int, Inventory]:
    entries = tuple(Copy(owner=owner, holding=holding) for owner, holding in of)
    return {**inventories, holder: dataclasses.replace(inventories[holder], copies=entries)}


def test_a_copy_stands_in_for_a_rank_whose_memory_is_lost():
    known = copies(ranks((held(12, 1),), ()), 0, (1, held(12, 0)), (1, held(10, 1)))
    plan = pick(1, known, Known())
    assert (plan.step, plan.tier) == (12, Tier.MEMORY)
    assert plan.sources[0] == Source(rank=0, shm_dir="/shm/0", slot=1)
    assert plan.sources[1] == Source(rank=1, shm_dir="/shm/1", slot=0, holder=0, generation=0)
    assert "rank 1 from a peer" in plan.reason
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_a_rank_that_has_its_own_needs_no_copy():
    known = copies(ranks((held(12),), (held(12),)), 0, (1, held(12, 1)))
    assert pick(1, known, Known()).sources[1].holder is None


def test_copies_of_another_rank_or_step_help_nobody():
    assert pick(1, copies(ranks((held(12),), (), ()), 0, (2, held(12))), Known()).tier is Tier.NONE
    assert pick(1, copies(ranks((held(12),), ()), 0, (1, held(10))), Known()).tier is Tier.NONE


def test_a_step_may_be_whole_in_copies_alone():
    known = copies(ranks((), ()), 0, (0, held(8)), (1, held(8)))
    plan = pick(1, known, Known())
    assert (plan.step, [source.holder for source in plan.sources.values()]) == (8, [0, 0])


def test_a_copy_is_refused_as_its_original_is():
    known = copies(ranks((held(12, 0, 2), held(10, 1, 1)), ()), 0, (1, held(12, 0, 1)), (1, held(10, 1, 1)))
    assert pick(3, known, Known(restored=(Restored(generation=2, step=10),))).step == 10
    assert pick(3, known, Known(poison=(Poison(from_step=11, to_step=12, generation=1),))).step == 10
    uncertified = copies(ranks((held(12),), ()), 0, (1, held(12, certified=False)))
    plan = pick(1, uncertified, Known())
    assert plan.tier is Tier.NONE
    assert "not certified in rank 0's copy of rank 1" in {refusal.reason for refusal in plan.refused}


def test_a_holder_that_could_not_give_is_not_asked_again():
    known = copies(ranks((held(12), held(8, 1)), (held(12), held(8, 1)), ()), 0, (2, held(12)), (2, held(8, 1)))
    assert pick(1, known, Known()).sources[2].holder == 0
    known[2] = dataclasses.replace(known[2], distrusted=frozenset({0}))
    assert pick(1, known, Known()).tier is Tier.NONE
    assert pick(1, copies(known, 1, (2, held(8))), Known()).step == 8


def test_a_holder_on_the_same_host_is_asked_first():
    known = ranks((held(12),), (held(12),), (), hosts="abb")
    known = copies(copies(known, 0, (2, held(12))), 1, (2, held(12)))
    assert pick(1, known, Known()).sources[2].holder == 1


def test_a_replica_is_of_no_use_to_a_rank_that_has_lost_what_it_alone_knew():
    parting, older = held(12, 1, parting=True, replica_key=KEY), held(10, certified=True, replica_key=KEY)
    known = copies(ranks((parting, older), ()), 0, (1, older))
    known[1] = dataclasses.replace(known[1], recorded=frozenset({12}))
    assert (pick(1, known, Known()).step, pick(1, known, Known()).sources[1].rank) == (12, 0)
    known[1] = dataclasses.replace(known[1], recorded=frozenset())
    plan = pick(1, known, Known())
    assert (plan.step, plan.sources[1].holder) == (10, 0)


def exchanging(inventories: dict[int, Inventory], **recorded: set[int]) -> dict[int, Inventory]:
    """All supervisors take part; `r<rank>` names what a rank recorded."""
    return {
        rank: dataclasses.replace(i, recorded=frozenset(recorded.get(f"r{rank}", ())))
        for rank, i in inventories.items()
    }


def notes(inventories: dict[int, Inventory], keeper: int, *of: tuple[int, Holding]) -> dict[int, Inventory]:
    entries = tuple(Copy(owner=owner, holding=holding) for owner, holding in of)
    return {**inventories, keeper: dataclasses.replace(inventories[keeper], notes=entries)}


def test_a_replica_on_another_host_gives_its_snapshot_over_the_network():
    parting, older = held(12, 1, 3, parting=True, replica_key=KEY), held(10, certified=True, replica_key=KEY)
    known = exchanging(ranks((older, parting), (older,), hosts="ab"), r1={12})
    plan = pick(4, known, Known())
    assert (plan.step, plan.sources[1]) == (12, Source(rank=0, shm_dir="/shm/0", slot=1, holder=0, generation=3))
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    known[1] = dataclasses.replace(known[1], distrusted=frozenset({0}))
    assert pick(4, known, Known()).step == 10
    assert pick(4, exchanging(ranks((older, parting), (older,), hosts="ab"), r1={11}), Known()).step == 10
    # The record says whose replica it is where no snapshot is left.
    known = exchanging(ranks((older, parting), (), hosts="ab"), r1={12})
    assert pick(4, known, Known()).tier is Tier.NONE
    known[1] = dataclasses.replace(known[1], replica_key=KEY)
    assert pick(4, known, Known()).sources[1].rank == 0


def test_a_rank_that_has_lost_everything_takes_a_replica_and_a_note():
    snapshot, note = held(10, 1, certified=True, replica_key=KEY), held(10, 0, certified=True, replica_key=KEY)
    known = notes(exchanging(ranks((snapshot,), (snapshot,), ())), 1, (2, note))
    plan = pick(1, known, Known())
    # A near replica, as all are on one host; 2 % 2 givers.
    assert plan.sources[2] == Source(rank=0, shm_dir="/shm/0", slot=1, noted_by=1, noted_in=0)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    far = notes(exchanging(ranks((snapshot,), (snapshot,), (), hosts="abc")), 1, (2, note))
    assert pick(1, far, Known()).sources[2].holder == 0
    for useless in (
        dataclasses.replace(note, replica_key=KEY + 1),
        dataclasses.replace(note, replica_key=0),
        dataclasses.replace(note, step=8),
        dataclasses.replace(note, certified=False),
    ):
        assert pick(1, notes(known, 1, (2, useless)), Known()).tier is Tier.NONE
    known[2] = dataclasses.replace(known[2], distrusted=frozenset({1}))
    assert pick(1, known, Known()).tier is Tier.NONE


def test_memory_that_is_older_than_a_forgotten_checkpoint_is_not_the_newest():
    memory = ranks((held(10),), (held(10),))
    newer = Committed(step=12, url="u", generation=0)
    assert pick(1, memory, Known(remembered=newer)).tier is Tier.NONE  # the trainers look into the store
    assert pick(1, memory, Known(remembered=dataclasses.replace(newer, step=10))).step == 10
    poison = (Poison(from_step=11, to_step=12, generation=0),)
    assert pick(1, memory, Known(remembered=newer, poison=poison)).step == 10


# ---- laws

holdings = st.builds(
    Holding,
    step=st.integers(0, 6),
    slot=st.integers(0, 3),
    generation=st.integers(0, 3),
    certified=st.booleans(),
    parting=st.booleans(),
    replica_key=st.integers(0, 2),
)
few_ranks = st.frozensets(st.integers(0, 3), max_size=2)


@st.composite
def inventories_of_a_world(draw: st.DrawFn) -> dict[int, Inventory]:
    lists = draw(st.lists(st.lists(holdings, max_size=4), min_size=1, max_size=4))
    kept = st.lists(st.builds(Copy, owner=st.integers(0, len(lists) - 1), holding=holdings), max_size=3).map(tuple)
    return {
        rank: Inventory(
            host=draw(st.sampled_from("ab")),
            shm_dir=f"/shm/{rank}",
            holdings=tuple(entries),
            copies=draw(kept),
            notes=draw(kept),
            distrusted=draw(few_ranks),
            replica_key=draw(st.integers(0, 2)),
            recorded=draw(st.none() | st.frozensets(st.integers(0, 6))),
        )
        for rank, entries in enumerate(lists)
    }


inventories = inventories_of_a_world()
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
    remembered=st.none() | st.builds(Committed, step=st.integers(0, 6), url=st.just("u"), generation=st.integers(0, 3)),
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
    copy = Copy(owner=data.draw(st.sampled_from(sorted(entries))), holding=extra)
    for kept in ("copies", "notes"):
        more = {**entries, rank: dataclasses.replace(inventory, **{kept: (*getattr(inventory, kept), copy)})}
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
        kept, noted = list(entries[rank].copies) * 2, list(entries[rank].notes) * 2
        random.shuffle(kept)
        random.shuffle(noted)
        shuffled[rank] = dataclasses.replace(
            entries[rank], holdings=tuple(twice), copies=tuple(kept), notes=tuple(noted)
        )
    assert pick(4, shuffled, known) == pick(4, entries, known)


@settings(max_examples=400)
@given(inventories, knowns)
def test_law_the_plan_is_sound(entries: dict[int, Inventory], known: Known):
    plan = pick(4, entries, known)
    if plan.tier is Tier.MEMORY:
        assert set(plan.sources) == set(entries)
        for rank, source in plan.sources.items():
            mine = entries[rank]
            offered = list(entries[source.rank].holdings)
            assert not {source.holder, source.noted_by} & mine.distrusted
            if source.holder is not None and source.rank == rank:
                offered = [copy.holding for copy in entries[source.holder].copies if copy.owner == rank]
            usable = [
                holding
                for holding in offered
                if (holding.step, holding.slot) == (plan.step, source.slot)
                if holding.certified or holding.parting
                if known.refusal(holding.step, holding.generation, in_memory=True) is None
            ]
            assert usable
            if source.rank != rank:  # a replica's
                if source.holder is None:
                    assert mine.host == entries[source.rank].host
                else:
                    assert source.holder == source.rank
                    assert mine.recorded is not None
                    assert entries[source.rank].recorded is not None
                keys = {mine.replica_key, *(holding.replica_key for holding in mine.holdings)}
                for other in entries.values():
                    keys |= {c.holding.replica_key for c in (*other.copies, *other.notes) if c.owner == rank}
                if source.noted_by is None:
                    assert mine.recorded is None or plan.step in mine.recorded
                else:
                    told = [copy for copy in entries[source.noted_by].notes if copy.owner == rank]
                    steps = {(plan.step, source.noted_in)}
                    keys = {c.holding.replica_key for c in told if (c.holding.step, c.holding.generation) in steps}
                assert keys & {holding.replica_key for holding in usable} - {0}
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


def test_a_plan_of_another_version_is_refused():
    fields = Plan(generation=1, step=None, tier=Tier.NONE, reason="").as_dict()
    with pytest.raises(ValueError, match="plan version 99"):
        Plan.from_dict({**fields, "version": 99})


def test_what_is_kept_for_a_rank_of_a_larger_world_says_nothing_of_this_one():
    kept = Copy(owner=7, holding=Holding(step=4, slot=0, replica_key=9))
    mine = Holding(step=4, slot=1, replica_key=3)
    inventory = Inventory(host="h", shm_dir="/0", holdings=(mine,), copies=(kept,))
    assert replica_keys({0: inventory}) == {0: frozenset({3})}
