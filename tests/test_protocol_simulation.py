"""Whole jobs under random faults: the invariants hold, every kind of fault was met, and a broken rule is found."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest

from arc_dist.errors import ExitCode
from arc_dist.protocol import commit as commits
from arc_dist.protocol import generations, job, pick, sources
from arc_dist.protocol.events import Died, JobOver, Joined, Ready
from arc_dist.protocol.job import Phase
from job_model import Model, Options, Violation, done_everywhere

SEEDS = 300


def _options(seed: int) -> Options:
    return Options(world_size=2 + seed % 3, replicated=seed % 2 == 0, kills=seed % 7)


def _play(seed: int) -> Model:
    model = Model(seed, _options(seed))
    ended = model.run()
    if ended.phase is not Phase.DONE or not done_everywhere(model):
        raise Violation(f"liveness: seed {seed} ended {ended.phase}, {ended.stop}")
    return model


def test_every_job_comes_to_its_end_whatever_happens():
    met: collections.Counter[str] = collections.Counter()
    for seed in range(SEEDS):
        try:
            model = _play(seed)
        except Violation as violation:
            pytest.fail(f"seed {seed}: {violation}")
        met.update(model.counts)
        met.update(plan.tier.value for plan in model.plans.values())
    missing = [kind for kind in ("kill", "replace", "restart", "poison", "duplicate", "commit") if met[kind] < 20]
    assert not missing, f"these were hardly met: {missing}"
    assert min(met["memory"], met["checkpoint"], met["none"]) >= 20


@pytest.mark.soak
def test_many_more_jobs_come_to_their_end():
    for seed in range(SEEDS, 100_000):
        _play(seed)


def test_a_seed_is_a_story():
    def story(seed: int) -> Any:
        model = _play(seed)
        return model.plans, model.manifests, model.now_s, model.counts

    assert story(7) == story(7)
    assert story(7) != story(8)


def test_a_job_that_never_gets_further_is_stopped():
    class Cursed(Model):
        def _train(self, supervisor: Any) -> None:
            self._fault_kill()

    for seed in range(20):
        model = Cursed(seed, Options(max_fruitless=3, replacements=0, coordinator_restarts=0))
        ended = model.run()
        assert ended.phase is Phase.STOPPED
        assert ended.stop is not None
        assert ended.stop.exit_code == ExitCode.NO_PROGRESS
        assert model.judged_generations == 3


# ---- each rule, broken in one place; the checks must find it


def _stale_ready_counts(patch: pytest.MonkeyPatch) -> None:
    honest = generations._ready

    def broken(config: Any, state: Any, event: Ready, now_s: float) -> Any:
        return honest(config, state, dataclasses.replace(event, generation=state.awaited), now_s)

    for phase in (Phase.STARTING, Phase.ENDING):
        patch.setitem(generations._TABLE[Ready], phase, broken)


def _starts_without_the_last(patch: pytest.MonkeyPatch) -> None:
    honest = generations._open_transition

    def broken(config: Any, state: Any, now_s: float) -> Any:
        if state.phase is not Phase.RUNNING and len(state.ready) == config.world_size - 1:
            config = dataclasses.replace(config, world_size=config.world_size - 1)
        return honest(config, state, now_s)

    patch.setattr(generations, "_open_transition", broken)


def _concludes_at_the_second_death(patch: pytest.MonkeyPatch) -> None:
    honest = generations._died_ending

    def broken(config: Any, state: Any, event: Died, now_s: float) -> Any:
        after, reason, actions = honest(config, state, event, now_s)
        if after is state:
            return after, reason, actions
        return generations._conclude(config, after, now_s)

    patch.setitem(generations._TABLE[Died], Phase.ENDING, broken)


def _uncertified_is_trusted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sources.Holding, "trusted", True)


def _abandoned_returns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pick.Restored, "abandons", lambda *_: False)


def _poison_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pick.Poison, "covers", lambda *_: False)


def _poison_does_not_reach_saves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commits, "poison", lambda saves, poisoned: saves)


def _oldest_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pick, "sorted", lambda items, key=None, reverse=False: sorted(items, key=key), raising=False)


def _shards_are_mixed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sources.Holding, "replica_key", property(lambda self: 1, lambda self, value: None))


def _memory_of_the_dead_counts(patch: pytest.MonkeyPatch) -> None:
    honest = generations._join

    def broken(config: Any, state: Any, event: Joined, now_s: float) -> Any:
        after, reason, actions = honest(config, state, event, now_s)
        return dataclasses.replace(after, ready=state.ready) if after is not state else after, reason, actions

    for phase in (Phase.STARTING, Phase.ENDING):
        patch.setitem(generations._TABLE[Joined], phase, broken)


def _finished_stays_finished(patch: pytest.MonkeyPatch) -> None:
    honest = generations._conclude

    def broken(config: Any, state: Any, now_s: float) -> Any:
        after, reason, actions = honest(config, state, now_s)
        return dataclasses.replace(after, finished=state.finished), reason, actions

    patch.setattr(generations, "_conclude", broken)


def _no_fence_on_shards(patch: pytest.MonkeyPatch) -> None:
    honest = commits.offer

    def broken(saves: Any, shard: Any) -> Any:
        offered = honest(dataclasses.replace(saves, open_generation=shard.generation), shard)
        restored = dataclasses.replace(offered.saves, open_generation=saves.open_generation)
        return dataclasses.replace(offered, saves=restored)

    def leaves_open(saves: Any, generation: Any) -> Any:
        return dataclasses.replace(saves, open_generation=generation)

    patch.setattr(commits, "offer", broken)
    patch.setattr(commits, "open_for", leaves_open)


def _commits_without_the_last(patch: pytest.MonkeyPatch) -> None:
    honest = commits.offer

    def broken(saves: Any, shard: Any) -> Any:
        return honest(dataclasses.replace(saves, world_size=max(1, saves.world_size - 1)), shard)

    patch.setattr(commits, "offer", broken)


def _run_is_not_journaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("job_model.GenerationRuns", JobOver)


def _journal_forgets(*names: str) -> Any:
    def breaks(patch: pytest.MonkeyPatch) -> None:
        honest = job.revive

        def broken(config: Any, record: Any, now_s: float) -> Any:
            empty = {"deaths": (), "finished": frozenset(), "phase": Phase.RUNNING}
            return dataclasses.replace(honest(config, record, now_s), **{name: empty[name] for name in names})

        patch.setattr(job, "revive", broken)

    return breaks


MUTATIONS = {
    "a ready of another generation counts": _stale_ready_counts,
    "a generation starts without the last rank": _starts_without_the_last,
    "an ending generation is over at the second death": _concludes_at_the_second_death,
    "an uncertified snapshot is trusted": _uncertified_is_trusted,
    "an abandoned snapshot returns": _abandoned_returns,
    "poison is forgotten": _poison_is_forgotten,
    "poison does not reach the saves": _poison_does_not_reach_saves,
    "the oldest whole step is taken": _oldest_first,
    "a rank's shard stands in for another's": _shards_are_mixed,
    "the memory of a replaced supervisor counts": _memory_of_the_dead_counts,
    "a finished rank is not started again": _finished_stays_finished,
    "shards of an older generation are taken": _no_fence_on_shards,
    "a step is committed without the last shard": _commits_without_the_last,
    "the decision to run is not journaled": _run_is_not_journaled,
    "the journal forgets who finished": _journal_forgets("finished"),
    "the journal forgets that a generation ends": _journal_forgets("phase", "deaths"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    MUTATIONS[name](monkeypatch)
    for seed in range(1500):
        try:
            _play(seed)
        except (Violation, AssertionError, KeyError, IndexError):
            return
    pytest.fail(f"no check noticed that {name}")
