"""Another number of ranks that cannot go on exactly: one clear error on all ranks, before any training."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from arc_dist import Arc, SeededSampler
from ranks import RankOutcome, rank_outcomes, run_ranks
from toy import Net, Noise

SAMPLES = 96


def loader_of(variant: dict[str, Any]) -> Any:
    data = Noise(variant.get("samples", SAMPLES))
    size = variant.get("batch_size", 4)
    match variant.get("loader", "seeded"):
        case "list":
            return [(data.x[i : i + size], data.y[i : i + size]) for i in range(0, len(data), size)]
        case "random":
            return DataLoader(data, batch_size=size, shuffle=True)
        case _:
            return DataLoader(data, batch_size=size, sampler=SeededSampler(data, seed=variant.get("seed", 0)))


def train_body(rank, world_size, store, steps, variant):
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(16, 4) if variant.get("model") == "other" else Net()
    model = DistributedDataParallel(model)
    arc = Arc(model, torch.optim.SGD(model.parameters(), lr=0.01), store=store, **variant.get("settings", {}))

    def loss_fn(batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    options = {key: variant[key] for key in ("exact", "epochs") if key in variant}
    return [step.number for step in arc.train(loss_fn, loader_of(variant), steps=steps, **options)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Copies of stores that two ranks have written, five steps each, by the variant that they wrote it with."""
    written: dict[str, Any] = {}

    def get(variant: dict[str, Any], where: Any) -> str:
        key = repr(variant)
        if key not in written:
            written[key] = tmp_path_factory.mktemp("store")
            assert run_ranks(2, train_body, str(written[key]), 5, variant, timeout_s=200) == [[1, 2, 3, 4, 5]] * 2
        shutil.copytree(written[key], where / "store")
        return str(where / "store")

    return get


def errors(outcomes: list[RankOutcome]) -> list[str]:
    assert not any(outcome.ok for outcome in outcomes), outcomes
    return [outcome.error or "" for outcome in outcomes]


ACCUMULATED = {"settings": {"accumulate": 3}}

REFUSED = {
    "world": ({}, 4, {}, r"CheckpointMismatch: .*4 ranks cannot share the 2 micro-batches .*Worlds that can: 1, 2\."),
    "forbidden": ({}, 1, {"settings": {"on_world_change": "error"}}, r"saved by 2 ranks, this job has 1.*Start 2"),
    "list": ({"loader": "list"}, 1, {"loader": "list"}, r"DataNotReproducible: .*is a list.*SeededSampler"),
    "random": ({}, 1, {"loader": "random"}, r"order of a RandomSampler is not known.*SeededSampler"),
    "dataset": ({}, 1, {"samples": 80}, r"samples was 96, is 80"),
    "seed": ({}, 1, {"seed": 1}, r"seed was 0, is 1"),
    "batch": ({}, 1, {"batch_size": 16}, r"= 8 samples per update, and this script asks for 1 x 1 x 16 = 16\. Leave"),
    "accumulate": ({}, 1, {"settings": {"accumulate": 4}}, r"asks for 1 x 4 x 4 = 16\. Leave accumulate=1"),
    "model": ({}, 1, {"model": "other"}, r"(?s)CheckpointMismatch: .*first\.weight"),
    # 25 samples per rank in 7 batches: the epoch's last step has 1 of 3 micro-batches per rank.
    "last step": (
        {**ACCUMULATED, "samples": 50}, 3, {**ACCUMULATED, "samples": 50, "epochs": 4}, r"3 ranks cannot share evenly",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_on_all_ranks(tmp_path, stores, name):
    before, ranks, after, message = REFUSED[name]
    store = stores(before, tmp_path)
    for error in errors(rank_outcomes(ranks, train_body, store, 8, after, timeout_s=200)):
        assert re.search(message, error), error


def test_a_script_that_divides_the_global_batch_by_itself_goes_on(tmp_path, stores):
    store = stores({}, tmp_path)
    assert run_ranks(1, train_body, store, 8, {"batch_size": 8}, timeout_s=200) == [[6, 7, 8]]


@pytest.mark.parametrize("after", [{"loader": "random"}, {"samples": 80}, {"batch_size": 16}])
def test_exactness_can_be_waived(tmp_path, stores, after):
    store = stores({}, tmp_path)
    (outcome,) = rank_outcomes(1, train_body, store, 8, {**after, "exact": False}, timeout_s=200)
    assert outcome.value == [6, 7, 8], outcome
    assert "going on inexactly with 1 ranks" in outcome.output
