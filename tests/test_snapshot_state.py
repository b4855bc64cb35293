"""Training state goes back in place, bit for bit: every optimizer, scheduler, wrapper and odd tensor."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from arc_dist.checkpoint_store.codec import decode, encode
from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import CheckpointMismatch, ConfigError
from arc_dist.snapshot.state import TrainingState

Saved = tuple[list[TensorSpec], list[torch.Tensor], dict[str, Any]]


def save(state: TrainingState) -> Saved:
    """A copy of the state that went through JSON, as in a slot or a checkpoint."""
    specs, tensors = state.tensors()
    value, parts = encode(state.small())
    copies = {path: part.detach().clone() for path, part in parts.items()}
    small = decode(json.loads(json.dumps(value, allow_nan=False)), copies)
    return list(specs), [tensor.detach().clone() for tensor in tensors], small


class Net(nn.Module):
    """Everything at once: tied weights, a frozen layer, batch norm, buffers of both kinds, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.scratch = self.scratch + 0.5  # replaced, not changed
        return self.head(nn.functional.dropout(self.norm(self.frozen(self.embed(index))), 0.2))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.5}, {"params": p[1:], "weight_decay": 0.0}]),
}


def make(kind: str = "adamw", seed: int = 0) -> tuple[TrainingState, Callable[[], None]]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = OPTIMIZERS[kind](trainable(model))
    scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
    state = TrainingState({"model": model}, {"optimizer": optimizer}, [scheduler])

    def step() -> None:
        optimizer.zero_grad()
        index = torch.randint(0, 11, (6,))
        nn.functional.cross_entropy(model(index), index).backward()
        optimizer.step()
        scheduler.step()

    return state, step


def pointers(state: TrainingState) -> dict[str, tuple[int, int]]:
    specs, tensors = state.tensors()
    return {spec.name: (id(tensor), tensor.data_ptr()) for spec, tensor in zip(specs, tensors, strict=True)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_going_back_and_on_equals_never_having_gone_back(kind: str) -> None:
    state, step = make(kind)
    start, digest_0 = save(state), state.digest()
    step()
    step()
    middle, digest_2 = save(state), state.digest()
    step()
    step()
    digest_4 = state.digest()
    assert len({digest_0, digest_2, digest_4}) == 3
    for _ in range(2):
        state.restore(*middle)
        assert state.digest() == digest_2
        step()
        step()
        assert state.digest() == digest_4
    state.restore(*start)
    assert state.digest() == digest_0
    assert not state.optimizers[0].state or kind in ("adagrad",)  # Adagrad has state from the beginning
    for _ in range(4):
        step()
    assert state.digest() == digest_4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fresh_process_with_other_weights_takes_the_state_over(kind: str) -> None:
    state, step = make(kind)
    for _ in range(3):
        step()
    saved, digest = save(state), state.digest()
    other, other_step = make(kind, seed=1)
    assert other.digest() != digest
    other.restore(*saved)
    assert other.digest() == digest
    step()
    after = state.digest()
    other.restore(*saved)
    other_step()
    assert other.digest() == after


@pytest.mark.parametrize("kind", ["adamw", "adam tensor lr", "sgd momentum", "adafactor"])
def test_memory_stays_where_it_is(kind: str) -> None:
    state, step = make(kind)
    step()
    step()
    saved = save(state)
    group = state.optimizers[0].param_groups[0]
    before, rate, groups = pointers(state), group["lr"], state.optimizers[0].param_groups
    # `scratch` is replaced by every forward pass, so what is restored is the present one
    step()
    present = pointers(state)
    grads = [p.grad for p in trainable(next(iter(state.models.values())))]
    state.restore(*saved)
    assert pointers(state) == present
    assert {name for name in before if before[name] != present[name]} == {"model.scratch"}
    assert state.optimizers[0].param_groups is groups
    assert groups[0] is group
    assert (group["lr"] is rate) == isinstance(rate, torch.Tensor)
    assert all(p.grad is grad for p, grad in zip(trainable(next(iter(state.models.values()))), grads, strict=True))


def test_the_lists_are_the_same_objects_until_something_is_replaced() -> None:
    state, step = make()
    step()
    specs, tensors = state.tensors()
    assert state.tensors()[0] is specs
    assert state.tensors()[1] is tensors
    state.optimizers[0].step()
    assert state.tensors()[0] is specs
    model = next(iter(state.models.values()))
    name, parameter = next(iter(model.named_parameters()))
    fields = state.optimizers[0].state[parameter]
    fields["exp_avg"] = fields["exp_avg"].clone()
    replaced = state.tensors()[1]
    assert replaced is not tensors
    assert any(tensor is fields["exp_avg"] for tensor in replaced)
    model.to(torch.float64)
    by_name = {spec.name: spec.dtype for spec in state.tensors()[0]}
    assert by_name[f"model.{name}"] == "float64"


def test_new_submodules_and_groups_are_found() -> None:
    state, _ = make()
    model = next(iter(state.models.values()))
    model.extra = nn.Linear(2, 3)
    assert "model.extra.weight" in {spec.name for spec in state.tensors()[0]}
    saved, digest = save(state), state.digest()
    state.optimizers[0].add_param_group({"params": model.extra.parameters(), "lr": 7.0})
    assert state.digest() != digest
    state.restore(*saved)
    assert state.digest() == digest
    assert len(state.optimizers[0].param_groups) == 1


def test_names_are_those_of_the_bare_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = {spec.name for spec in TrainingState({"m": model}, {}).tensors()[0]}
    wrapped = {spec.name for spec in TrainingState({"m": torch.compile(nn.DataParallel(model))}, {}).tensors()[0]}
    assert plain == wrapped == {"model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"}
    a, b = nn.Linear(2, 1), nn.Linear(1, 2)
    optimizers = {"g": torch.optim.SGD(a.parameters(), momentum=0.9), "d": torch.optim.Adam(b.parameters())}
    state = TrainingState({"gen": a, "dis": b}, optimizers)
    b(a(torch.ones(1, 2))).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    names = {spec.name for spec in state.tensors()[0]}
    assert {"model.gen.weight", "model.dis.bias"} <= names
    assert {"optimizer.g.state.gen.weight.momentum_buffer", "optimizer.d.state.dis.bias.step"} <= names
    saved, digest = save(state), state.digest()
    for optimizer in optimizers.values():
        optimizer.step()
    assert state.digest() != digest
    state.restore(*saved)
    assert state.digest() == digest


def test_tied_parameters_come_once_and_stay_tied() -> None:
    state, step = make()
    names = [spec.name for spec in state.tensors()[0]]
    assert "model.embed.weight" in names
    assert "model.head.weight" not in names
    assert {"model.frozen.weight", "model.seen", "model.scratch", "model.norm.running_mean"} <= set(names)
    assert len(names) == len(set(names))
    saved = save(state)
    step()
    state.restore(*saved)
    model = next(iter(state.models.values()))
    assert isinstance(model, Net)
    assert model.head.weight is model.embed.weight


def test_buffers_are_not_judged_and_all_else_is() -> None:
    state, step = make()
    step()
    judged = {spec.name for spec in state.tensors()[0] if state.is_judged(spec.name)}
    assert "model.embed.weight" in judged
    assert "optimizer.state.embed.weight.exp_avg" in judged
    assert not judged & {"model.seen", "model.scratch", "model.norm.running_var"}


def test_every_bit_pattern_survives() -> None:
    """NaN payloads, signalling NaNs, -0.0, denormals, in floats of all widths, also where memory is not contiguous."""
    model = nn.Module()
    patterns = [0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001, 0x7F800000]
    words = torch.tensor([struct.unpack("<i", struct.pack("<I", p))[0] for p in patterns * 100], dtype=torch.int32)
    model.a = nn.Parameter(words.view(torch.float32).clone())
    model.b = nn.Parameter(words.view(torch.bfloat16).clone())
    model.c = nn.Parameter(words.view(torch.float16).clone().view(30, 40).t())
    model.register_buffer("d", words.view(torch.float64).clone())
    model.register_buffer("e", words.view(torch.complex64).clone())
    model.register_buffer(
        "f", words.view(torch.float32).clone().view(2, 3, 10, 10).to(memory_format=torch.channels_last)
    )
    model.register_buffer("g", words.view(torch.uint8).view(torch.float8_e4m3fn).clone())
    model.register_buffer("h", torch.arange(3.0).expand(4, 3))  # twelve places, three elements
    model.register_buffer("i", torch.tensor(True))
    model.register_buffer("j", torch.empty(0, 5))

    def bits() -> list[bytes]:
        return [t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in state.tensors()[1]]

    state = TrainingState({"m": model}, {})
    saved, before = save(state), bits()
    digest = state.digest()
    with torch.no_grad():
        for tensor in state.tensors()[1]:
            if tensor.numel() and 0 not in tensor.stride():
                tensor.zero_()
        model.h[0].fill_(9.0)
    assert bits() != before
    state.restore(*saved)
    assert bits() == before
    assert state.digest() == digest


class Odd(torch.optim.Optimizer):
    """Keeps state of every shape: nothing, empty, numbers, lists of tensors, state of no parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.rounds = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.rounds += 1
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            mine = self.state[parameter]
            parameter.add_(torch.randn_like(parameter))
            if index == 0:
                mine.update(count=self.rounds, history=[parameter.clone() for _ in range(self.rounds % 3)], none=None)
            if index == 1 and self.rounds % 2:
                mine["sometimes"] = torch.ones(2)
            elif index == 1:
                mine.pop("sometimes", None)
        self.state["all"] = {"rounds": self.rounds, "mean": torch.tensor(1.0 * self.rounds)}


def test_optimizers_with_odd_state() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = Odd(model.parameters())
    state = TrainingState({"m": model}, {"o": optimizer})
    kept: list[tuple[Saved, str]] = [(save(state), state.digest())]
    for _ in range(4):
        optimizer.step()
        kept.append((save(state), state.digest()))
    assert len({digest for _, digest in kept}) == 5
    for index in (1, 4, 0, 2, 3, 0, 4):
        saved, digest = kept[index]
        state.restore(*saved)
        assert state.digest() == digest, index


def test_lbfgs() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    state = TrainingState({"m": model}, {"o": optimizer})
    x, y = torch.randn(8, 3), torch.randn(8, 1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    saved, digest = save(state), state.digest()
    optimizer.step(closure)
    after = state.digest()
    state.restore(*saved)
    assert state.digest() == digest
    optimizer.step(closure)
    assert state.digest() == after


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "cosine restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 5]),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_schedulers_and_rates_go_back_together(kind: str) -> None:
    def build() -> tuple[TrainingState, Any, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        scheduler = SCHEDULERS[kind](optimizer)
        return TrainingState({"m": model}, {"o": optimizer}, [scheduler]), scheduler, optimizer

    state, scheduler, optimizer = build()
    rates: list[float] = []
    kept: list[Saved] = []
    for _ in range(8):
        kept.append(save(state))
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    fresh, fresh_scheduler, fresh_optimizer = build()
    for target, target_scheduler, target_optimizer in (
        (state, scheduler, optimizer),
        (fresh, fresh_scheduler, fresh_optimizer),
    ):
        for start in (5, 2, 0):
            target.restore(*kept[start])
            for expected in rates[start:]:
                assert target_optimizer.param_groups[0]["lr"] == expected
                target_scheduler.step()


def test_plateau_scaler_and_extras() -> None:
    class Counter:
        def __init__(self) -> None:
            self.values: list[float] = [float("nan")]

        def state_dict(self) -> dict[str, Any]:
            return {"values": self.values}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.values = state["values"]

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    scaler, off, counter = (
        torch.amp.GradScaler("cpu", init_scale=8.0),
        torch.amp.GradScaler("cpu", enabled=False),
        Counter(),
    )
    state = TrainingState({"m": model}, {"o": optimizer}, [plateau], scaler, {"counter": counter})
    disabled = TrainingState({"m": model}, {"o": optimizer}, [], off)
    disabled.restore(*save(disabled))
    saved, digest = save(state), state.digest()
    for _ in range(5):
        plateau.step(1.0)
        counter.values.append(1.0)
    scaler.scale(torch.ones(1))
    scaler.update(2.0)
    changed = state.digest()
    assert changed != digest
    for _ in range(2):
        state.restore(*saved)
        assert state.digest() == digest
        assert scaler.get_scale() == 8.0
        counter.values.append(3.0)  # must not reach what was saved


def test_without_small_objects_only_tensors_go_back() -> None:
    state, step = make()
    step()
    specs, tensors, _ = save(state)
    before = [tensor.clone() for tensor in tensors]
    step()
    step()
    rate = state.optimizers[0].param_groups[0]["lr"]
    state.restore(specs, tensors, None)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors()[1], before, strict=True))
    assert state.optimizers[0].param_groups[0]["lr"] == rate
    fresh, _ = make(seed=3)
    fresh.restore(specs, tensors, None)
    assert all(torch.equal(a, b) for a, b in zip(fresh.tensors()[1], before, strict=True))


def test_digests_tell_what_they_should() -> None:
    state, _ = make()
    digest, replica = state.digest(), state.replica_digest()
    torch.rand(1)
    assert state.digest() != digest
    assert state.replica_digest() == replica
    model = next(iter(state.models.values()))
    assert isinstance(model, Net)
    model.norm.running_mean.add_(1)  # each rank has its own
    assert state.replica_digest() == replica
    with torch.no_grad():
        model.head.weight[3, 2] = -model.head.weight[3, 2]
    assert state.replica_digest() != replica
    assert make(seed=0)[0].signature() == make(seed=1)[0].signature() != make("sgd")[0].signature()
    assert state.moving_buffers() == {}  # one rank alone


# --- bad input ---


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"is a list, not a torch\.nn\.Module"):
        TrainingState({"m": [model]}, {})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="no model"):
        TrainingState({}, {})
    with pytest.raises(ConfigError, match=r"not a torch.optim.Optimizer"):
        TrainingState({"m": model}, {"o": model})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="no state_dict"):
        TrainingState({"m": model}, {}, extras={"x": 3})
    with pytest.raises(ConfigError, match="meta device"):
        TrainingState({"m": nn.Linear(2, 2, device="meta")}, {})
    with pytest.raises(ConfigError, match="lazy module"):
        TrainingState({"m": nn.LazyLinear(2)}, {})
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(2).to_sparse())
    with pytest.raises(ConfigError, match=r"s has layout torch.sparse"):
        TrainingState({"m": sparse}, {})


def test_an_optimizer_of_other_parameters_is_refused_with_their_shapes() -> None:
    model, other = nn.Linear(2, 3), nn.Linear(5, 7)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()])
    with pytest.raises(
        ConfigError, match=r"SGD holds 2 of 4 parameters .*\[7, 5\] float32, \[7\] float32.*fully_shard"
    ):
        TrainingState({"m": model}, {"o": optimizer})


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    state, step = make()
    step()
    specs, tensors, small = save(state)
    other_model = nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 9))
    other = TrainingState({"m": other_model}, {"o": torch.optim.SGD(other_model.parameters())})
    digest = state.digest()
    with pytest.raises(CheckpointMismatch, match=r"model\.1\.weight \[9, 9\] is not in this model"):
        state.restore(*save(other))
    kept = [index for index, spec in enumerate(specs) if spec.name != "model.seen"]
    with pytest.raises(CheckpointMismatch, match=r"model\.seen \[3\] is missing"):
        state.restore([specs[i] for i in kept], [tensors[i] for i in kept], small)
    wrong = TensorSpec("model.seen", "float32", (3,), (3,), (0,), True)
    changed = [wrong if spec.name == "model.seen" else spec for spec in specs]
    with pytest.raises(CheckpointMismatch, match=r"is \[3\] float32, this model has \[3\] int64"):
        state.restore(changed, tensors, small)
    with pytest.raises(CheckpointMismatch, match="schedulers: 2"):
        state.restore(specs, tensors, {**small, "schedulers": [{}, {}]})
    renamed = copy.deepcopy(small)
    renamed["optimizers"]["optimizer"]["groups"][0]["params"][0] = "elsewhere.weight"
    with pytest.raises(CheckpointMismatch, match=r"elsewhere\.weight"):
        state.restore(specs, tensors, renamed)
    assert state.digest() == digest
