"""The whole ladder in real trainings: each rung in its order, on every rank alike, with a report at the end."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from arc_dist import Arc, ConfigError, HealingPolicy, TrainingStopped
from arc_dist.healing import Case, OwnRung, register
from arc_dist.protocol.healing import Mode
from arc_dist.snapshot.layout import read_header
from ranks import run_ranks, run_supervised
from toy import Net, Toy, guarded

KINDS = {"single": 1, "ddp": 2, "fsdp": 2}
AT = 33  # the step that fails
WAIT_S = 60.0


def launch(kind, body, *args, timeout_s=100.0):
    toy = Toy(kind=kind, steps=70)
    if kind == "single":
        return [body(0, 1, toy, *args)]
    return run_ranks(KINDS[kind], body, toy, *args, timeout_s=timeout_s)


def hurt(model):
    """A weight of this rank turns to infinity."""
    weight = max(model.parameters(), key=lambda p: p.numel())
    with torch.no_grad():
        (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[3] = math.inf


def is_finite(model):
    return all(bool(torch.isfinite(p.to_local() if isinstance(p, DTensor) else p).all()) for p in model.parameters())


class Watched:
    """A guarded training whose healing is written down.

    Attributes:
        acted: per action: rung, step reached, digest of the replica right after, factors on rate and clip, the limit.
        told: the incidents, on rank 0.
    """

    def __init__(self, toy, *, wrap_loss=None, **settings):
        self.job = guarded(toy, wrap_loss=wrap_loss, **settings)
        self.acted, self.told = [], []
        self.first = next(self.job.steps)
        guard = self.guard = self.job.arc._engine.guard
        if guard._record is not None:
            guard._record = lambda **fields: self.told.append(fields)
        original = guard.healer.act

        def act(decision):
            done = original(decision)
            clip = guard.on_clip_scale.__self__._max_norm
            scales = (guard.rate.factor, guard.clip_scale, clip)
            self.acted.append((done.name, guard.step, self.job.replica(), scales))
            return done

        guard.healer.act = act

    def commits(self, step):
        """Waits until the checkpoint of `step` is committed."""
        deadline = time.monotonic() + WAIT_S
        while step not in self.job.arc._engine._checkpointer.committed:
            assert time.monotonic() < deadline, f"step {step} was not committed"
            time.sleep(0.01)

    @property
    def rungs(self):
        return [(name, step) for name, step, *_ in self.acted]


LADDER = [
    ("replay", 30),
    ("rollback", 30),
    ("rollback", 30),
    ("older", 25),
    ("older", 20),
    ("checkpoint", 10),
    ("escape", 30),
    ("escape", 30),
]
# Short ways back, so that a run of 70 steps sees all of it.
POLICY = HealingPolicy(lr_restore_after=4, ramp_steps=4)
SETTINGS = {"policy": POLICY, "snapshot_every": 5, "snapshots": 4, "checkpoint_every": 10}


def persistent_body(rank, world_size, toy, store):
    """A weight of the last rank is hurt after step 32, every time that it is reached."""
    watched = Watched(toy, store=store, **SETTINGS)
    fired = 0
    try:
        for step in watched.job.steps:
            if step.number == 14 and not step.repeated:
                watched.commits(10)
            if step.number == AT - 1 and rank == world_size - 1:
                hurt(watched.job.model)
                fired += 1
    except TrainingStopped as stopped:
        return fired, watched.acted, stopped, watched.told
    raise AssertionError("a fault that never ends must stop the run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_for_ever_climbs_the_whole_ladder_and_stops_with_a_report(kind, tmp_path):
    outcomes = launch(kind, persistent_body, str(tmp_path))
    assert outcomes[-1][0] == len(LADDER) + 1, "the fault fired before each action"
    for _, acted, stopped, _ in outcomes:
        message = str(stopped)
        assert (type(stopped), stopped.exit_code) == (TrainingStopped, 77)
        assert [(name, step) for name, step, *_ in acted] == LADDER
        assert re.search(rf"step {AT}.*8 rollbacks brought no progress beyond step {AT}", message)
        assert "replay to step 30 at step 33 (2 steps" in message
        assert "checkpoint to step 10 at step 33 (22 steps" in message
        scales = [scale for *_, scale in acted]
        assert [rate for rate, *_ in scales] == [1.0, *(0.5**n for n in range(1, 7)), POLICY.lr_floor]
        assert [clip for _, clip, _ in scales] == [1.0, 0.5, 0.25, 0.125, *[POLICY.clip_floor] * 4]
        assert all(limit == toy_clip() * clip for _, clip, limit in scales), "the limit in use is the one that is said"
    if kind == "ddp":
        assert outcomes[0][1] == outcomes[1][1], "replicas are equal after every action"
    told = [line for line in outcomes[0][3] if line["kind"] == "numeric"]
    assert [line["rung"] for line in told] == [name for name, _ in LADDER] + [""]
    assert [line["action"] for line in told] == [*["rollback"] * 5, "checkpoint", "escape", "escape", "stop"]
    assert [line["mode"] for line in told] == [*["recovering"] * 6, "escaping", "escaping", "stopped"]
    assert [line["steps_lost"] for line in told[:-1]] == [AT - 1 - step for _, step in LADDER]
    assert all(line["resumed_after_s"] >= 0 for line in told)
    assert told[0]["changed"] == {}
    assert told[1]["changed"] == {"batches": [32, 32], "lr_scale": [1.0, 0.5], "clip_scale": [1.0, 0.5]}
    assert told[6]["changed"]["moments"] == "reset" and told[6]["changed"]["perturbation"] == 0.01
    first, last = told[6]["changed"]["batches"]
    assert last - first == POLICY.skip_ahead_steps
    assert [entry["rung"] for entry in told[-1]["tried"]] == [name for name, _ in LADDER] + [""]
    json.dumps(told)


def toy_clip():
    return Toy().clip


def transient_body(rank, world_size, toy, root, depths):
    """The same fault, but it ends after so many actions: the run goes on to its end."""
    found = []
    for depth in depths:
        watched = Watched(toy, store=f"{root}/{depth}", **SETTINGS)
        fired, replicas = 0, []
        for step in watched.job.steps:
            replicas.append((step.number, watched.job.replica()))
            if step.number == 14 and not step.repeated:
                watched.commits(10)
            if step.number == AT - 1 and len(watched.acted) < depth:
                fired += 1
                if rank == world_size - 1:
                    hurt(watched.job.model)
        guard = watched.guard
        ends = (guard.step, guard.history.mode, guard.rate.factor, guard.clip_scale, is_finite(watched.job.model))
        found.append((fired, watched.acted, ends, replicas, watched.job.arc._engine._source.skipped()))
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("depths", [[4, 7], pytest.param([1, 2, 3, 5, 6, 8], marks=pytest.mark.soak)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_ends_after_some_rungs_is_trained_through(kind, depths, tmp_path):
    outcomes = launch(kind, transient_body, str(tmp_path), depths, timeout_s=300.0)
    for index, depth in enumerate(depths):
        runs = [outcome[index] for outcome in outcomes]
        for fired, acted, ends, replicas, skipped in runs:
            assert fired == depth
            assert [(name, step) for name, step, *_ in acted] == LADDER[:depth]
            assert ends == (70, Mode.TRAINING, 1.0, 1.0, True), "the whole rate and clip are back in the end"
            assert skipped == runs[0][4] and skipped
            if kind == "ddp":
                assert (acted, replicas) == (runs[0][1], runs[0][3])


# ---------------------------------------------------------------------- rungs and policies of one's own


@register
class Careful(OwnRung):
    """Raises on one rank, where it is told to, after it has hurt that rank's weights."""

    name = "careful"
    raises_on: int | None = None
    differs = False

    def heal(self, case: Case) -> str:
        if case.rank == self.raises_on:
            hurt(case.models[""])
            raise RuntimeError("a bug of the user's")
        if self.differs:
            with torch.no_grad():
                next(iter(case.models[""].parameters())).add_(case.rank)
        return f"step {case.step} after {', '.join(case.flags)}"


class Wilful(HealingPolicy):
    """A policy whose choice goes wrong in a given way on the last rank."""

    def ladder_for(self, evidence):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.max_consecutive_skips == 7 and rank == 1:
            raise KeyError("a bug of the user's")
        if self.max_consecutive_skips == 8 and rank == 1:
            return ("escape",)
        return ("careful",)


def own_body(rank, world_size, toy, policy, raises_on, differs):
    Careful.raises_on, Careful.differs = raises_on, differs
    watched = Watched(dataclasses.replace(toy, steps=30), policy=policy, snapshot_every=5)
    fired = 0
    for step in watched.job.steps:
        if step.number == 12 and not fired:
            fired += 1
            if rank == world_size - 1:
                hurt(watched.job.model)
    return fired, watched.rungs, watched.told, is_finite(watched.job.model), watched.job.replica()


OWN = HealingPolicy(ladder=("careful", "rollback", "escape"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rung_of_ones_own_heals(kind):
    outcomes = launch(kind, own_body, OWN, None, False)
    for fired, rungs, _, finite, replica in outcomes:
        assert (fired, rungs, finite) == (1, [("careful", 10)], True)
        assert kind != "ddp" or replica == outcomes[0][4]
    (line,) = [line for line in outcomes[0][2] if line["kind"] == "numeric"]
    assert (line["action"], line["rung"]) == ("careful", "careful")
    assert line["changed"]["careful"].startswith("step 10 after loss_nonfinite")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rung_that_raises_on_one_rank_is_told_and_all_ranks_go_on_to_the_next(kind):
    outcomes = launch(kind, own_body, OWN, KINDS[kind] - 1, False)
    for fired, rungs, _, finite, replica in outcomes:
        assert (fired, rungs, finite) == (1, [("rollback", 10)], True)
        assert kind != "ddp" or replica == outcomes[0][4]
    (line,) = [line for line in outcomes[0][2] if line["kind"] == "healing_failed"]
    assert f"the rung careful failed: rank {KINDS[kind] - 1}: RuntimeError: a bug of the user's" in line["cause"]


def test_a_rung_that_leaves_replicas_different_is_undone():
    outcomes = launch("ddp", own_body, OWN, None, True)
    for _, rungs, _, _, replica in outcomes:
        assert rungs == [("rollback", 10)]
        assert replica == outcomes[0][4]
    assert any("replicas that differ" in line.get("cause", "") for line in outcomes[0][2])


@pytest.mark.parametrize("wrong", [7, 8])
def test_a_policy_that_goes_wrong_on_one_rank_is_passed_over_by_all(wrong):
    policy = Wilful(max_consecutive_skips=wrong)
    outcomes = launch("fsdp", own_body, policy, None, False)
    for _, rungs, *_ in outcomes:
        assert rungs == [("replay", 10)], "the policy's plain ladder"
    (line,) = [line for line in outcomes[0][2] if line["kind"] == "healing_failed"]
    assert line["cause"].startswith("Wilful.ladder_for is passed over: ")
    assert ("KeyError" if wrong == 7 else "differs between ranks") in line["cause"]


def test_a_policy_of_ones_own_chooses():
    outcomes = launch("ddp", own_body, Wilful(), None, False)
    assert all(rungs == [("careful", 10)] for _, rungs, *_ in outcomes)


def test_the_example_runs(capsys):
    import own_rung

    own_rung.main()
    out = capsys.readouterr().out
    assert re.search(r"^heard of rollback \{.*'lr_scale': \[1.0, 0.5\]", out, re.MULTILINE)
    assert re.search(r"^heard of zero_last \{.*'32 weights are zero'", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (HealingPolicy(ladder=("skip", "unheard_of")), r"no rung unheard_of\. Known: skip, .*careful"),
        ({"ladder": ("skip",)}, "must be a HealingPolicy"),
    ],
)
def test_policies_that_cannot_be_followed_are_refused(policy, message):
    model = Net()
    with pytest.raises(ConfigError, match=message):
        Arc(model, torch.optim.SGD(model.parameters()), policy=policy)


@pytest.mark.parametrize("name", ["skip", "stop", "no name", None])
def test_names_of_rungs_that_cannot_be_used(name):
    with pytest.raises(ConfigError, match=r"already|identifier"):
        register(type("Wrong", (OwnRung,), {"name": name, "heal": lambda self, case: ""}))


# ---------------------------------------------------------------------- failures of healing itself


def damaged_body(rank, world_size, toy):
    """One rank's newest snapshot is damaged in memory before it is needed."""
    watched = Watched(dataclasses.replace(toy, steps=30), snapshot_every=5, snapshots=4)
    fired = 0
    for step in watched.job.steps:
        if step.number == 18 and not fired:
            fired += 1
            if rank == world_size - 1:
                hurt(watched.job.model)
                guard = watched.guard
                buffer = guard.ring._slots[guard.protection.slot_of(15)]._buffer
                place = read_header(buffer).small_offset + 4
                buffer[place : place + 4] = bytes(byte ^ 0xFF for byte in buffer[place : place + 4])
    return fired, watched.rungs, is_finite(watched.job.model), watched.told


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_that_is_damaged_on_one_rank_is_passed_over_by_all(kind):
    outcomes = launch(kind, damaged_body)
    for fired, rungs, finite, _ in outcomes:
        assert (fired, rungs, finite) == (1, [("older", 10)], True)
    failed = [line["cause"] for line in outcomes[0][3] if line["kind"] == "healing_failed"]
    assert [cause.split()[2] for cause in failed] == ["replay", "rollback", "rollback"]


def no_checkpoint_body(rank, world_size, toy, store):
    policy = HealingPolicy(ladder=("checkpoint", "escape"))
    watched = Watched(dataclasses.replace(toy, steps=20), store=store, policy=policy)
    fired = 0
    for step in watched.job.steps:
        if step.number == 8 and not fired:
            fired += 1
            if rank == world_size - 1:
                hurt(watched.job.model)
    return fired, watched.rungs


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_a_store_without_a_checkpoint_yet_leads_to_the_next_rung(kind, tmp_path):
    for fired, rungs in launch(kind, no_checkpoint_body, str(tmp_path)):
        assert (fired, rungs) == (1, [("escape", 5)])


def perfect_fit_body(rank, world_size, toy):
    """From step 20 on the gradient is exactly zero."""

    def wrap(loss, arc):
        return loss * 0.0 if arc.steps_done + 1 >= 20 else loss

    job = guarded(dataclasses.replace(toy, steps=40), wrap_loss=wrap)
    return [(step.number, step.action) for step in job.steps]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_stays_zero_does_not_keep_a_run_from_its_end(kind):
    for steps in launch(kind, perfect_fit_body):
        assert [number for number, _ in steps] == list(range(1, 41))
        assert [number for number, action in steps if action != "apply"] == [20]


# ---------------------------------------------------------------------- memory of healing

SCRIPT = """
import json, os, signal, sys, math
from pathlib import Path
import torch.distributed as dist
sys.path.insert(0, TESTS)
from toy import Toy, guarded

dist.init_process_group("gloo")
rank, out = dist.get_rank(), Path(sys.argv[1])
fired = []

def wrap(loss, arc):
    if arc.steps_done + 1 == 13 and rank == 1 and len(fired) < 11 and os.environ["ARC_GENERATION"] == "0":
        fired.append(1)
        return loss * math.nan
    return loss

job = guarded(Toy(kind=sys.argv[2], steps=40), wrap_loss=wrap)
first = None
for step in job.steps:
    guard = job.arc._engine.guard
    if first is None:
        first = {"history": guard.history.as_dict(), "skipped": guard.data.skipped(), "rate": guard.rate.factor}
        first["account"] = [entry["rung"] for entry in guard.healer.account]
    if os.environ["ARC_GENERATION"] == "0" and rank == 1 and step.repeated and guard.history.tried:
        os.kill(os.getpid(), signal.SIGKILL)
(out / f"{rank}.json").write_text(json.dumps(first))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_that_dies_after_a_rollback_has_not_forgotten_it(kind, tmp_path):
    """The snapshot that it goes on from is from before the fault, under FSDP2 for every rank."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    result = run_supervised(2, str(script), str(tmp_path), kind, cwd=tmp_path, timeout_s=200)
    assert result.exit_code == 0, result
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    history = found[0]["history"]
    assert history["mode"] == "recovering" and history["tried"] == ["rollback"]
    assert found[0]["rate"] == history["lr_scale"] == 0.5
    assert found[0]["skipped"] == list(range(12, 23)), "what was left out stays left out"
    assert found[0]["account"] == ["skip"] * 10 + ["rollback"]


# ---------------------------------------------------------------------- hearing of it


def test_a_callback_hears_of_incidents_and_is_dropped_when_it_keeps_raising(caplog):
    caplog.set_level("WARNING", logger="arc_dist")
    heard, fired = [], []

    def listener(line):
        heard.append(line)
        raise ValueError("a bug of the user's")

    def wrap(loss, arc):
        if arc.steps_done + 1 >= 12 and len(fired) < 6:
            fired.append(1)
            return loss * math.nan
        return loss

    job = guarded(Toy(), wrap_loss=wrap, on_incident=listener)
    assert len(list(job.steps)) == 30
    assert len(fired) == 6
    assert [(line["kind"], line["action"]) for line in heard] == [("numeric", "skip")] * 3, "three times, then no more"
    assert "on_incident is not called any more after 3 errors" in caplog.text
    with pytest.raises(ConfigError, match="on_incident"):
        guarded(Toy(), on_incident="print")
