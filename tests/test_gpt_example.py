"""The example model: its sizes are those the figures name, its data are the same at every start, and it learns."""

from __future__ import annotations

import pytest
import torch

from gpt import (
    GPT,
    GPTConfig,
    StdlibText,
    count_parameters,
    held_out_loss,
    make_optimizer,
    next_byte_loss,
    stdlib_files,
)


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [(GPTConfig(), 1e6, 3e6), (GPTConfig.m10(), 9.8e6, 10.2e6), (GPTConfig.m50(), 49e6, 51e6)],
    ids=["default", "10M", "50M"],
)
def test_sizes(config: GPTConfig, low: float, high: float):
    with torch.device("meta"):
        model = GPT(config)
    assert low <= count_parameters(model) <= high


def test_targets_are_the_next_bytes_and_windows_follow_each_other():
    data = StdlibText(64, max_bytes=10_000)
    inputs, targets = data[3]
    assert inputs[1:].equal(targets[:-1])
    assert data[4][0][0] == targets[-1]
    assert len(data) == (10_000 - 1) // 64
    with pytest.raises(IndexError):
        data[len(data)]


def test_the_split_shares_no_file_and_does_not_change():
    train, held_out = StdlibText(64), StdlibText(64, held_out=True)
    assert train.data.equal(StdlibText(64).data)
    assert len(train.data) > 1 << 20
    assert len(held_out.data) > 1 << 16
    assert stdlib_files() == sorted(stdlib_files())
    assert not train.data[:4096].equal(held_out.data[:4096])


def test_causal():
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=16, layers=2, heads=2, width=32)).eval()
    inputs = torch.randint(0, 256, (1, 16))
    changed = inputs.clone()
    changed[0, 9] += 1
    before, after = model(inputs), model(changed % 256)
    assert before[:, :9].allclose(after[:, :9])
    assert not before[:, 9:].allclose(after[:, 9:])


def test_learns():
    torch.manual_seed(0)
    config = GPTConfig(context=32, layers=2, heads=2, width=64)
    model = GPT(config)
    optimizer = make_optimizer(model, lr=3e-3)
    data = StdlibText(config.context)
    first = held_out_loss(model, context=config.context, num_windows=32)
    for step in range(60):
        windows = [data[(step * 16 + i) * 37 % len(data)] for i in range(16)]
        batch = (torch.stack([w[0] for w in windows]), torch.stack([w[1] for w in windows]))
        loss = next_byte_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.training
    assert held_out_loss(model, context=config.context, num_windows=32) < first - 1.5
