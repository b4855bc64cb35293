"""Forms of snapshots in whole trainings: rollbacks, killed ranks and checkpoints, exact or rounded as promised."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from arc_dist.checkpoint_store import Store
from arc_dist.cli import main
from arc_dist.snapshot import layout
from ranks import run_ranks
from test_restart import assert_fired, job, undisturbed
from toy import Toy, guarded, plain

AT = 13  # the weights turn bad after this step; the newest trusted snapshot is that of step 10
SNAPSHOT = 10


def local_parts(job):
    """Copies of this rank's parameters, and of its optimizer state."""
    plain_of = lambda t: (t.to_local() if isinstance(t, DTensor) else t).detach().clone()  # noqa: E731
    state = [entry for optimizer in job.optimizers for entry in optimizer.state.values()]
    return [plain_of(p) for p in job.model.parameters()], [plain_of(t) for entry in state for t in entry.values()]


def rollback_body(rank, world_size, toy, form):
    """A weight of the last rank turns to infinity after step AT, once; what the rollback gave, and how it ended."""
    job = guarded(toy, snapshot_form=form)
    fired, at_snapshot, files = 0, None, []
    seen = []

    def load_and_look(*args, **kwargs):
        load(*args, **kwargs)
        seen.append((local_parts(job), job.replica()))

    for step in job.steps:
        if step.number == 1:  # the loop tells of a rollback after the next update; what was restored is seen here
            guard = job.arc._engine.guard
            load, guard.load = guard.load, load_and_look
        if step.number == SNAPSHOT and at_snapshot is None:
            at_snapshot = local_parts(job)
        if step.number == AT and not fired:
            fired += 1
            if rank == world_size - 1:
                with torch.no_grad():
                    weight = job.model.module.first.weight if toy.kind == "ddp" else job.model.first.weight
                    (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[3] = math.inf
            directory = job.arc._engine.ring._owned.path
            files = [(path.name, path.is_symlink()) for path in sorted(directory.glob("*.bin"))]
            assert max(info.step for info in layout.inspect(directory) if info.certified) == SNAPSHOT
    assert fired == 1
    ((restored, replica),) = seen
    return job.digest(), job.replica(), replica, at_snapshot, restored, files


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("ddp", "incremental"),
        pytest.param("fsdp", "incremental", marks=pytest.mark.soak),
        pytest.param("ddp", "disk", marks=pytest.mark.soak),
        pytest.param("fsdp", "disk", marks=pytest.mark.soak),
        pytest.param("ddp", "auto", marks=pytest.mark.soak),
    ],
)
def test_a_rollback_from_a_lossless_form_changes_no_bit(kind, form):
    toy = Toy(kind=kind, steps=20, frozen=True, width=65)
    ends = run_ranks(2, rollback_body, toy, form)
    assert [end[0] for end in ends] == run_ranks(2, plain_body, toy)
    for *_, (parameters, moments), restored, files in ends:
        assert all(torch.equal(a, b) for a, b in zip(parameters, restored[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments, restored[1], strict=True))
        slots = [is_link for name, is_link in files if name.startswith("slot")]
        assert slots == [form == "disk"] * 2
        assert any(name.startswith("base") for name, _ in files) == (form == "incremental")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_rollback_from_bf16_gives_all_ranks_the_same_rounded_weights_and_the_exact_optimizer(kind):
    ends = run_ranks(2, rollback_body, Toy(kind=kind, steps=20), "bf16")
    for _, _, _, (parameters, moments), restored, _ in ends:
        assert any(not torch.equal(value, value.bfloat16().float()) for value in parameters), "nothing to round"
        assert all(
            torch.equal(value.bfloat16().float(), back) for value, back in zip(parameters, restored[0], strict=True)
        )
        assert moments
        assert all(torch.equal(a, b) for a, b in zip(moments, restored[1], strict=True))
    if kind == "ddp":
        assert len({replica for _, _, replica, *_ in ends}) == 1
        assert len({replica for _, replica, *_ in ends}) == 1


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_restored_from_an_incremental_snapshot_is_killed_again_and_no_bit_changes(tmp_path, kind):
    toy = Toy(kind=kind, steps=24, frozen=True, width=65)
    kills = {"0": [13], "1": [13, 18]}  # the second time it holds what it had read from its own base
    results, output = job(tmp_path, toy, 2, kills=kills, settings={"snapshot_form": "incremental"})
    assert_fired(tmp_path, kills)
    assert [result["digest"] for result in results] == undisturbed(toy, 2), output
    assert all(result["bases"] for result in results), "nothing was shared, so nothing was tested"


@pytest.mark.soak
@pytest.mark.parametrize("form", ["incremental", "disk"])
def test_a_survivors_snapshot_stands_in_whatever_its_form(tmp_path, form):
    toy = Toy(kind="ddp", steps=20, frozen=True, width=65)
    kills = {"1": [13]}
    results, output = job(tmp_path, toy, 2, kills=kills, settings={"snapshot_every": 50, "snapshot_form": form})
    assert_fired(tmp_path, kills)
    assert results[0]["steps"][0] == [13, "apply", False], output
    assert [result["digest"] for result in results] == undisturbed(toy, 2)


@pytest.mark.soak
def test_a_survivors_rounded_snapshot_keeps_replicas_equal(tmp_path):
    kills = {"1": [13]}
    settings = {"snapshot_every": 50, "snapshot_form": "bf16"}
    results, output = job(tmp_path, Toy(kind="ddp", steps=20), 2, kills=kills, settings=settings)
    assert_fired(tmp_path, kills)
    assert results[0]["steps"][0] == [13, "apply", False], output
    assert results[0]["replica"] == results[1]["replica"]
    assert output.count("rounded to bfloat16: a rollback") == 2, "once in each generation"


@pytest.mark.parametrize("dedup", [False, True])
def test_a_checkpoint_of_rounded_weights_says_so_and_keeps_their_dtype(tmp_path, capsys, caplog, dedup):
    toy = Toy(steps=12, frozen=True, width=65)
    store = str(tmp_path / "store")
    run = guarded(toy, store=store, checkpoint_every=4, snapshot_form="bf16", dedup=dedup)
    list(run.steps)
    assert [record.levelname for record in caplog.records if "rounded" in record.message] == ["WARNING"]
    opened = Store(store).open(12)
    assert opened.meta["weights"] == "rounded to bfloat16"
    assert opened.meta["data"]["batch"] == 12, "what else is said is still there"
    specs = opened.specs()
    names = [name for name in specs if name.startswith("model.")]
    assert {specs[name].dtype for name in names} == {"float32"}
    tensors = opened.read([specs[name] for name in names])
    live = dict(run.model.named_parameters())
    for name, tensor in zip(names, tensors, strict=True):
        assert torch.equal(tensor, live[name.removeprefix("model.")].detach().bfloat16().float())
    assert main(["verify", store]) == 0
    assert main(["inspect", store]) == 0
    assert "rounded to bfloat16" in capsys.readouterr().out
    # A job that goes on from it finds the exact optimizer state and the rounded weights, in any form.
    longer = guarded(dataclasses.replace(toy, steps=13), store=store)
    assert [step.number for step in longer.steps] == [13]
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    assert longer.arc._engine.resumed.step == 12
    meta = Store(store).open(13).meta
    assert "weights" not in meta, "the later checkpoint is exact"


def test_an_exact_checkpoint_says_nothing_of_rounding(tmp_path):
    for form in ("full", "incremental", "disk"):
        store = str(tmp_path / form)
        run = guarded(Toy(steps=8, frozen=True, width=65), store=store, checkpoint_every=4, snapshot_form=form)
        list(run.steps)
        opened = Store(store).open(8)
        assert "weights" not in opened.meta
        live = dict(run.model.named_parameters())
        specs = {name: spec for name, spec in opened.specs().items() if name.startswith("model.")}
        for name, tensor in zip(specs, opened.read(list(specs.values())), strict=True):
            assert torch.equal(tensor, live[name.removeprefix("model.")].detach())
