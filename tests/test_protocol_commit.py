"""When a set of shards becomes a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol import commit
from arc_dist.protocol.commit import CommitStatus, Saves, Shard
from arc_dist.protocol.pick import Poison


def saves(world_size: int = 2, generation: int | None = 1) -> Saves:
    return Saves(world_size=world_size, open_generation=generation)


def shard(rank: int, step: int = 10, generation: int = 1, url: str = "u", **more: Any) -> Shard:
    return Shard(rank=rank, generation=generation, step=step, url=url, part={"rank": rank}, **more)


def test_the_last_shard_asks_for_the_one_manifest():
    first = commit.offer(saves(), shard(0))
    assert (first.status, first.commit) == (CommitStatus.PENDING, None)
    last = commit.offer(first.saves, shard(1))
    assert last.status is CommitStatus.COMMITTING
    assert last.commit is not None
    assert last.commit.parts == {0: {"rank": 0}, 1: {"rank": 1}}
    assert commit.offer(last.saves, shard(1)).commit is None
    done = commit.settle(last.saves, 10, 1, None)
    assert commit.status_of(done, 10, 1) == (CommitStatus.COMMITTED, None)
    again = commit.offer(done, shard(0))
    assert (again.status, again.commit) == (CommitStatus.COMMITTED, None)


def test_a_refused_manifest_is_told():
    both = commit.offer(commit.offer(saves(), shard(0)).saves, shard(1)).saves
    failed = commit.settle(both, 10, 1, "the disk is full")
    assert commit.status_of(failed, 10, 1) == (CommitStatus.FAILED, "the disk is full")
    assert commit.settle(failed, 10, 1, None) is failed  # a late success changes nothing


def test_only_the_open_generation_commits():
    for generation in (0, 2):
        answer = commit.offer(saves(), shard(0, generation=generation))
        assert answer.status is CommitStatus.FENCED
        assert answer.saves == saves()
    assert commit.offer(saves(generation=None), shard(0)).status is CommitStatus.FENCED
    assert commit.status_of(saves(), 10, 0)[0] is CommitStatus.FENCED
    assert commit.status_of(saves(), 10, 1)[0] is CommitStatus.UNKNOWN


def test_what_a_generation_leaves_incomplete_is_abandoned():
    pending = commit.offer(saves(), shard(0)).saves
    closed = commit.open_for(pending, 2)
    status, error = commit.status_of(closed, 10, 1)
    assert status is CommitStatus.ABANDONED
    assert "1 of 2 shards" in str(error)
    assert commit.offer(closed, shard(1)).status is CommitStatus.FENCED
    # The same generation opened again, as while it is ending, loses nothing.
    assert commit.open_for(pending, 1) == pending


def test_a_manifest_that_is_being_written_survives_the_end_of_its_generation():
    both = commit.offer(commit.offer(saves(), shard(0)).saves, shard(1)).saves
    assert both.committing() == {10}
    closed = commit.open_for(both, 2)
    assert commit.status_of(commit.settle(closed, 10, 1, None), 10, 1)[0] is CommitStatus.COMMITTED


def test_one_uncertified_shard_makes_the_step_uncertified():
    both = commit.offer(commit.offer(saves(), shard(0, certified=False)).saves, shard(1))
    assert both.commit is not None
    assert not both.commit.certified


def test_two_stores_are_refused():
    answer = commit.offer(commit.offer(saves(), shard(0)).saves, shard(1, url="v"))
    assert answer.status is CommitStatus.FAILED
    assert "use one store" in answer.reason


def test_a_rank_that_does_not_exist_is_refused():
    assert commit.offer(saves(), shard(2)).status is CommitStatus.FENCED


def test_a_shard_written_again_replaces_the_word():
    first = commit.offer(saves(), shard(0)).saves
    second = commit.offer(first, replace(shard(0), part={"rank": 0, "try": 2})).saves
    last = commit.offer(second, shard(1))
    assert last.commit is not None
    assert last.commit.parts[0] == {"rank": 0, "try": 2}


def test_poison_reaches_what_is_pending_and_what_comes():
    pending = commit.offer(saves(), shard(0)).saves
    poisoned = commit.poison(pending, (Poison(from_step=9, to_step=12, generation=1),))
    assert commit.status_of(poisoned, 10, 1)[0] is CommitStatus.ABANDONED
    assert commit.offer(poisoned, shard(0, step=12)).status is CommitStatus.ABANDONED
    assert commit.offer(poisoned, shard(0, step=13)).status is CommitStatus.PENDING


def test_memory_is_bounded():
    state = saves(world_size=1)
    for step in range(300):
        state = commit.settle(commit.offer(state, shard(0, step)).saves, step, 1, None)
    assert len(state.saves) <= 64
    state = saves(world_size=2)
    for step in range(300):
        state = commit.offer(state, shard(0, step)).saves
    waiting = [save.step for save in state.saves.values() if save.status is CommitStatus.PENDING]
    assert waiting == list(range(284, 300))
    assert commit.status_of(state, 283, 1)[0] is CommitStatus.ABANDONED


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=30))
def test_law_at_most_one_manifest_whatever_the_order_and_the_repetitions(offers: list[tuple[int, int]]):
    state, manifests, heard = saves(world_size=3), [], set()
    for rank, step in offers:
        answer = commit.offer(state, shard(rank, step))
        state = answer.saves
        heard.add((rank, step))
        if answer.commit is not None:
            manifests.append(answer.commit.step)
            assert set(answer.commit.parts) == {0, 1, 2}
    whole = {step for _, step in heard if all((rank, step) in heard for rank in range(3))}
    assert sorted(manifests) == sorted(whole)


# ---------------------------------------------------------------------- tiers


def test_a_rank_that_writes_to_a_slower_tier_takes_the_others_along():
    first = commit.offer(saves(), shard(0)).saves
    moved = commit.offer(first, shard(1, url="v", tier=1, why="rank 1: full"))
    assert moved.status is CommitStatus.PENDING
    status, error = commit.status_of(moved.saves, 10, 1, 0)
    assert status is CommitStatus.MOVED
    assert "rank 1: full" in str(error)
    assert commit.status_of(moved.saves, 10, 1, 1) == (CommitStatus.PENDING, None)
    late = commit.offer(moved.saves, shard(0))
    assert (late.status, late.saves) == (CommitStatus.MOVED, moved.saves)
    done = commit.offer(moved.saves, shard(0, url="v", tier=1))
    assert done.commit is not None
    assert (done.commit.url, set(done.commit.parts)) == ("v", {0, 1})


def test_a_refused_manifest_may_be_tried_in_the_next_tier():
    both = commit.offer(commit.offer(saves(), shard(0)).saves, shard(1)).saves
    failed = commit.settle(both, 10, 1, "the disk is full")
    assert commit.offer(failed, shard(0)).status is CommitStatus.FAILED
    again = commit.offer(failed, shard(0, url="v", tier=1))
    assert again.status is CommitStatus.PENDING
    assert commit.offer(again.saves, shard(1, url="v", tier=1)).commit is not None


def test_a_rank_that_no_tier_takes_a_shard_from_ends_the_wait_of_the_others():
    waiting = commit.offer(saves(), shard(0)).saves
    given_up = commit.give_up(waiting, 1, 10, 1, "all disks are full")
    status, error = commit.status_of(given_up, 10, 1)
    assert status is CommitStatus.ABANDONED
    assert "rank 1" in str(error)
    assert commit.offer(given_up, shard(1, url="v", tier=1)).status is CommitStatus.ABANDONED
    committing = commit.offer(waiting, shard(1)).saves
    assert commit.give_up(committing, 1, 10, 1, "late") is committing
    assert commit.give_up(waiting, 1, 10, 0, "of an older generation") is waiting


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=40))
def test_a_manifest_has_all_its_shards_in_one_tier_and_tiers_only_grow(words):
    """Ranks offer shards to whatever tiers in any order; some manifests are refused."""
    now, committed, tier = saves(world_size=3), 0, 0
    for rank, of_tier, refuse in words:
        answer = commit.offer(now, shard(rank, url=f"t{of_tier}", tier=of_tier))
        now = answer.saves
        if answer.commit is not None:
            assert set(answer.commit.parts) == {0, 1, 2}
            assert answer.commit.url == f"t{answer.commit.tier}"
            assert answer.commit.tier >= tier
            committed += not refuse
            now = commit.settle(now, 10, 1, "refused" if refuse else None)
        save = now.find(10, 1)
        if save is not None:
            assert save.tier >= tier
            tier = save.tier
    assert committed <= 1


def test_poison_leaves_what_is_over_or_of_other_steps_alone():
    both = commit.offer(commit.offer(saves(), shard(0)).saves, shard(0, step=20)).saves
    poison = (Poison(from_step=9, to_step=12, generation=1),)
    once = commit.poison(both, poison)
    assert commit.status_of(once, 20, 1)[0] is CommitStatus.PENDING
    assert commit.poison(once, poison) == once
