"""Bad input: one clear error with the remedy and the right exit code, on all ranks, without a hang."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from arc_dist import Arc, ArcError, ConfigError, DataNotReproducible, StoreError
from arc_dist.errors import CheckpointMismatch, StoreCorrupt
from ranks import run_job, run_ranks
from toy import Net, Noise, Toy, guarded

TOY_SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")


def adam(model):
    return torch.optim.AdamW(model.parameters())


def test_what_is_not_a_model_or_an_optimizer():
    model = Net()
    with pytest.raises(ConfigError, match=r"Linear.*not a torch\.nn\.Module|not a torch\.nn\.Module"):
        Arc("model", adam(model))
    with pytest.raises(ConfigError, match=r"not a torch\.optim\.Optimizer"):
        Arc(model, None)
    with pytest.raises(ConfigError, match="optimizer"):
        Arc(model, [])
    with pytest.raises(ConfigError, match="model"):
        Arc(model, adam(Net()))
    with pytest.raises(ConfigError, match=r"no setting max_norm.*max_grad_norm"):
        Arc(model, adam(model), max_norm=1.0)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"snapshots": 1}, "2 or more"),
        ({"snapshot_every": 0}, "1 or more"),
        ({"accumulate": 0}, "1 or more"),
        ({"max_grad_norm": -1.0}, "above 0"),
        ({"ignore": ("nonsense",)}, "nonsense"),
        ({"snapshot_every": 1, "certify_after": 5}, "ever be trusted"),
        ({"scheduler_every": "week"}, "step or epoch"),
    ],
)
def test_settings_out_of_range_are_named(setting, rule):
    model = Net()
    with pytest.raises(ConfigError, match=rule):
        Arc(model, adam(model), **setting)


def loader():
    return DataLoader(Noise(64), batch_size=8)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda out: out, "shape"),
        (lambda out: out.mean().item(), "float"),
        (lambda out: out.detach().mean(), "without a gradient"),
        (lambda out: None, "NoneType"),
    ],
)
def test_what_is_not_a_loss(returned, message):
    model = Net()
    arc = Arc(model, adam(model))
    with pytest.raises(ConfigError, match=message):
        next(arc.train(lambda batch: returned(model(batch[0])), loader()))


def test_an_arc_is_used_in_one_way():
    model = Net()
    arc = Arc(model, adam(model))
    steps = arc.train(lambda batch: model(batch[0]).mean(), loader())
    next(steps)
    with pytest.raises(ConfigError, match="step"):
        arc.step(model(torch.zeros(2, 16)).mean())
    with pytest.raises(ConfigError, match="in use"):
        next(arc.train(lambda batch: model(batch[0]).mean(), loader()))
    with pytest.raises(ConfigError, match="callable"):
        next(Arc(model, adam(model)).train(None, loader()))


def test_stores_that_cannot_be_used(tmp_path):
    def start(store):
        model = Net()
        return next(Arc(model, adam(model), store=store).train(lambda batch: model(batch[0]).mean(), loader()))

    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ArcError, match="file"):
        start(str(file))
    with pytest.raises(ArcError, match="nothing-here"):
        start(str(tmp_path / "nothing-here" / "deep"))
    with pytest.raises(ConfigError, match="foo"):
        start("foo://bucket/run")


def test_a_checkpoint_of_another_model_lists_what_differs(tmp_path):
    def run(model):
        return list(
            Arc(model, adam(model), store=str(tmp_path)).train(lambda b: model(b[0]).square().mean(), loader(), steps=3)
        )

    run(Net())
    with pytest.raises(CheckpointMismatch, match=r"(?s)model\.first\.weight: not in the model.*") as caught:
        run(torch.nn.Sequential(torch.nn.Linear(16, 4)))
    assert caught.value.exit_code == 78


def test_a_checkpoint_of_a_newer_format(tmp_path):
    model = Net()
    list(Arc(model, adam(model), store=str(tmp_path)).train(lambda b: model(b[0]).square().mean(), loader(), steps=3))
    (manifest,) = tmp_path.glob("run/step-*/manifest.json")
    body = manifest.read_bytes().rpartition(b',\n"manifest_digest"')[0]
    newer = body.replace(b'"version": 1', b'"version": 3')
    assert newer != body
    digest = hashlib.sha256(newer).hexdigest().encode()
    manifest.write_bytes(newer + b',\n"manifest_digest": "sha256:' + digest + b'"\n}\n')
    with pytest.raises(StoreError, match=r"[Uu]pgrade|newer"):
        list(Arc(model, adam(model), store=str(tmp_path)).train(lambda b: model(b[0]).mean(), loader(), steps=4))


def test_a_store_whose_only_checkpoint_is_damaged_is_not_started_over(tmp_path):
    def run(steps):
        model = Net()
        arc = Arc(model, adam(model), store=str(tmp_path))
        return list(arc.train(lambda b: model(b[0]).square().mean(), loader(), steps=steps))

    run(3)
    for manifest in tmp_path.glob("run/step-*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-10])
    with pytest.raises(StoreCorrupt, match="arc verify"):
        run(4)


def test_a_generator_cannot_be_resumed_and_says_so(tmp_path):
    def run(steps, seed):
        model = Net()
        generator = torch.Generator().manual_seed(seed)
        batches = (torch.randn(8, 16, generator=generator) for _ in range(100))
        arc = Arc(model, adam(model), store=str(tmp_path))
        return list(arc.train(lambda b: model(b).square().mean(), batches, steps=steps))

    run(5, seed=1)
    with pytest.raises(DataNotReproducible, match="batch 0"):
        run(8, seed=2)


def differing_settings_body(rank, world_size):
    toy = Toy(kind="ddp")
    settings = {"max_grad_norm": 1.0 + rank} if rank < 2 else {}
    with pytest.raises(ConfigError, match=r"max_grad_norm: rank 0 has 1\.0, rank 1 has 2\.0"):
        list(guarded(toy, **settings).steps)
    return True


def test_ranks_with_different_settings_are_named():
    assert run_ranks(2, differing_settings_body) == [True, True]


def different_data_body(rank, world_size):
    model = torch.nn.parallel.DistributedDataParallel(Net())
    arc = Arc(model, adam(model))
    with pytest.raises(ConfigError, match="rank 0 has 8 batches, rank 1 has 4 batches"):
        list(arc.train(lambda b: model(b[0]).mean(), DataLoader(Noise(64 // (rank + 1)), batch_size=8)))
    return True


def test_ranks_with_different_amounts_of_data_are_named():
    assert run_ranks(2, different_data_body) == [True, True]


def unwritable_store_body(rank, world_size, path):
    model = torch.nn.parallel.DistributedDataParallel(Net())
    arc = Arc(model, adam(model), store=path)
    with pytest.raises(ArcError) as caught:
        list(arc.train(lambda b: model(b[0]).mean(), loader()))
    return type(caught.value).__name__, str(caught.value)


def test_a_store_that_is_a_file_ends_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    outcomes = run_ranks(2, unwritable_store_body, str(tmp_path / "file"))
    assert all("file" in message for _, message in outcomes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_exit_codes_of_a_job_that_is_configured_wrongly(tmp_path, ranks):
    config = {"toy": {"kind": "ddp" if ranks > 1 else "single"}, "out": str(tmp_path), "settings": {"snapshots": 1}}
    base = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", f"--nproc-per-node={ranks}"]
    done = run_job([*base, TOY_SCRIPT, json.dumps(config)], env={"OMP_NUM_THREADS": "1"}, timeout_s=60)
    assert done.exit_code == 78, str(done)
    assert "snapshots=1" in done.stderr
    missing = run_job([*base, str(tmp_path / "missing.py")], env={"OMP_NUM_THREADS": "1"}, timeout_s=60)
    assert missing.exit_code == 78, str(missing)
    assert missing.stderr.count("does not exist") == 1
