"""The monitors of a rank together: turns, budget, faults, alerts, healthy trainings, settings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arc_dist import Arc, ConfigError
from arc_dist.monitoring import Monitoring
from arc_dist.monitors import Finding, Monitor, Sees, register
from arc_dist.monitors.base import FULL, LITE, STANDARD, chosen
from arc_dist.monitors.budget import Budget
from arc_dist.protocol.flags import Flag
from arc_dist.settings import Settings
from arc_dist.snapshot.state import TrainingState
from toy import Net, Toy, guarded, plain


class Clock:
    """Seconds that pass when told to, and `tick` of them at each reading."""

    def __init__(self, tick=0.0):
        self.now = 0.0
        self.tick = tick

    def __call__(self):
        self.now += self.tick
        return self.now


@register
class Expensive(Monitor):
    """Takes as long as the test says."""

    name = "test_expensive"
    sees = Sees.WEIGHT
    clock = Clock()
    cost_s = 0.0
    looks = 0

    def look(self, subject):
        type(self).looks += 1
        type(self).clock.now += self.cost_s
        return []


@register
class Raising(Monitor):
    name = "test_raising"
    sees = Sees.GROUPS

    def look(self, subject):
        raise RuntimeError("broken inside")


@register
class Unwritable(Monitor):
    """Its state cannot be written down."""

    name = "test_unwritable"
    sees = Sees.GROUPS

    def look(self, subject):
        return []

    def state_dict(self):
        return {"lambda": lambda: None}


@register
class At(Monitor):
    """Finds something at one step."""

    name = "test_at"
    sees = Sees.WEIGHT

    def __init__(self, *, step=20):
        self.step = step
        self.done = False

    def look(self, subject):
        if subject.step != self.step or self.done:
            return []
        self.done = True
        return [self.found(subject.name, 1.0, 0.0)]


def trained(model, names, clock=None, **more):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = TrainingState(models={"": model}, optimizers={"": optimizer})
    monitoring = Monitoring(state, Settings(monitors=names, **more), clock=clock or Clock())
    return optimizer, monitoring


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 0.5), st.floats(0.01, 0.3), st.floats(1e-3, 1.0))
def test_looks_take_no_more_than_their_share(share, cost_s, step_s):
    clock = Clock()
    budget = Budget(share, clock, burst_s=1.0)
    looks = 0
    for _ in range(300):
        clock.now += step_s
        while budget.is_due():
            began = clock()
            clock.now += cost_s
            budget.charge(began)
            looks += 1
    assert looks >= 1
    # One look may be taken on credit, and as much as was saved up.
    assert budget.spent_s <= share * clock.now + cost_s + 1.0 * share
    if share * step_s > 2 * cost_s:
        assert looks >= 299, "what there is time for is used"


def test_monitors_of_numbers_look_when_there_is_something_new_to_see():
    """They cost little for each number and much for each look, so short steps share one."""
    clock = Clock()
    _, monitoring = trained(nn.Linear(4, 4), ("lite",), clock=clock, monitor_budget=1.0)
    looks = 0
    for step in range(320):
        clock.now += 1e-3
        looks += monitoring.is_due()
        if monitoring.is_due():
            monitoring.look(step)
        monitoring.accepted(step, 1.0)
    assert 20 <= looks <= 24, "one per 16 numbers, and one for the hyperparameters at first"
    for step in range(320, 330):
        clock.now += 2.0
        assert monitoring.is_due(), "steps of seconds are looked at one by one"
        monitoring.look(step)
        monitoring.accepted(step, 1.0)


def test_what_no_look_was_worth_yet_is_looked_at_in_the_end():
    clock = Clock()
    _, monitoring = trained(nn.Linear(4, 4), ("metric_nonfinite",), clock=clock)
    clock.now += 1e-3
    monitoring.look(0)
    monitoring.metric("val/accuracy", 3, math.nan)
    assert not monitoring.is_due()
    assert monitoring.look_at_rest() == 0
    assert [alert["what"] for alert in monitoring.take_alerts()] == ["metric_nonfinite: val/accuracy"]


def test_the_monitors_of_a_rank_keep_the_budget_by_looking_less_often():
    Expensive.clock, Expensive.cost_s, Expensive.looks = Clock(), 0.01, 0
    model = nn.Linear(4, 4)
    _, monitoring = trained(model, ("test_expensive",), clock=Expensive.clock, monitor_budget=0.02)
    for step in range(1000):
        Expensive.clock.now += 0.1
        if monitoring.is_due():
            monitoring.look(step)
    assert 150 <= Expensive.looks <= 210, "2 % of 100 s at 10 ms a look are 200"
    assert monitoring.take_alerts() == []


def test_a_monitor_that_is_slow_or_raises_is_switched_off_once_and_says_so():
    Expensive.clock, Expensive.cost_s, Expensive.looks = Clock(), 5.0, 0
    model = nn.Linear(4, 4)
    names = ("test_expensive", "test_raising", "test_unwritable", "hyperparameters")
    _, monitoring = trained(model, names, clock=Expensive.clock, monitor_budget=1.0)
    for step in range(200):
        Expensive.clock.now += 1.0
        if monitoring.is_due():
            assert monitoring.look(step) == 0
        monitoring.state_dict()
    texts = [alert["what"] for alert in monitoring.take_alerts()]
    assert Expensive.looks == 3
    assert sorted(text.split()[1] for text in texts) == ["test_expensive", "test_raising", "test_unwritable"]
    assert any("broken inside" in text for text in texts)
    assert list(monitoring.state_dict()) == ["hyperparameters"], "the others go on"


# ---------------------------------------------------------------------- healthy trainings


class TinyGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Parameter(torch.zeros(16, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, x):
        return self.head(self.block(self.tokens(x) + self.places))


def mlp():
    x = torch.randn(512, 16)
    y = (x @ torch.randn(16, 3)).argmax(1)

    def loss(model):
        index = torch.randint(512, (16,))
        return nn.functional.cross_entropy(model(x[index]), y[index])

    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)), loss


def cnn():
    x, y = torch.randn(256, 1, 8, 8), torch.randint(0, 4, (256,))

    def loss(model):
        index = torch.randint(256, (8,))
        return nn.functional.cross_entropy(model(x[index]), y[index])

    layers = (nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(256, 4)), loss


def gpt():
    text = torch.randint(0, 50, (64, 17))

    def loss(model):
        rows = text[torch.randint(64, (4,))]
        return nn.functional.cross_entropy(model(rows[:, :-1]).reshape(-1, 50), rows[:, 1:].reshape(-1))

    return TinyGPT(), loss


SCHEDULES = {
    "warm-up and cosine": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 3e-3, total_steps=n + 1),
    "warm restarts": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, n // 5),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("family", "steps"), [(mlp, 2000), (cnn, 500), (gpt, 500)])
def test_a_healthy_training_raises_nothing_when_every_step_is_looked_at(family, steps, schedule):
    torch.manual_seed(0)
    model, make_loss = family()
    clock = Clock(tick=0.03)  # so that several monitors look in each step
    optimizer, monitoring = trained(model, ("full",), clock=clock, monitor_budget=1.0)
    scheduler = SCHEDULES[schedule](optimizer, steps)
    for step in range(steps):
        clock.now += 1.0
        loss = make_loss(model)
        loss.backward()
        assert monitoring.is_due()
        assert monitoring.look(step) == 0, monitoring.take_findings()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        monitoring.accepted(step, loss.item())
        monitoring.metric("accuracy", step, math.exp(-loss.item()) + 0.3)
        monitoring.updated()
        assert monitoring.take_alerts() == [], step


# ---------------------------------------------------------------------- what parameters may be like


def test_parameters_of_every_kind_are_passed_over_or_judged():
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Parameter(torch.randn(16, 16))
            self.again = self.shared
            self.frozen = nn.Parameter(torch.randn(16, 16), requires_grad=False)
            self.complex = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64))
            self.integers = nn.Parameter(torch.ones(16, dtype=torch.int64), requires_grad=False)
            self.nothing = nn.Parameter(torch.zeros(0, 16))
            self.scalar = nn.Parameter(torch.tensor(1.0))
            self.rows = nn.Embedding(32, 16, sparse=True)

        def forward(self, x):
            x = self.rows(x) @ self.shared @ self.frozen * self.scalar
            return (x @ self.complex.abs()).square().mean() + self.nothing.sum()

    model = Odd()
    dense = [p for name, p in model.named_parameters() if name != "rows.weight" and p.requires_grad]
    optimizers = {"dense": torch.optim.AdamW(dense), "sparse": torch.optim.SparseAdam([model.rows.weight])}
    state = TrainingState(models={"": model}, optimizers=optimizers)
    clock = Clock(tick=0.03)
    monitoring = Monitoring(state, Settings(monitors=("full", "gradient_origin"), monitor_budget=1.0), clock=clock)
    extra = nn.Parameter(torch.randn(16, 16))
    for step in range(200):
        clock.now += 1.0
        if step == 100:  # a parameter comes in mid-run, and one goes
            model.extra = extra
            optimizers["dense"].add_param_group({"params": [extra]})
            gone, model.scalar = model.scalar, None
            group = optimizers["dense"].param_groups[0]
            group["params"] = [parameter for parameter in group["params"] if parameter is not gone]
            optimizers["dense"].state.pop(gone)
            Odd.forward = lambda self, x: (self.rows(x) @ self.shared @ self.extra).square().mean()
        monitoring.origin.begin()
        model(torch.randint(0, 32, (8,))).backward()
        assert monitoring.look(step) == 0
        monitoring.state_dict()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        monitoring.accepted(step, 1.0)
        monitoring.updated()
        assert monitoring.take_findings() == []
    assert monitoring.take_alerts() == []
    monitoring.close()


# ---------------------------------------------------------------------- under `Arc.train`


def test_with_all_monitors_a_run_ends_bitwise_as_the_unguarded_one():
    toy = Toy(steps=60)
    job = guarded(toy, monitors=("full", "gradient_origin", "repeated_batches", "nonfinite_batch"), monitor_budget=1.0)
    assert {step.action for step in job.steps} == {"apply"}
    assert job.digest() == plain(toy)[0]


@pytest.mark.parametrize(("policy", "expected"), [("alert", []), ("skip", ["skip"]), ("rollback", ["rollback"])])
def test_the_policy_of_a_monitor_of_ones_own(policy, expected, caplog):
    options = {"test_at": {"policy": policy, "step": 20}}
    job = guarded(Toy(), monitors=("test_at",), monitor_options=options, monitor_budget=1.0)
    records = []
    actions = []
    for step in job.steps:
        if not records:
            job.arc._engine.guard._record = lambda **fields: records.append(fields)
            records.append(None)
        actions.append(step.action)
    assert [action for action in actions if action != "apply"] == expected
    told = [fields for fields in records[1:] if fields["kind"] in ("alert", "numeric")]
    assert len(told) == 1 and "test_at: " in told[0]["cause"]


def test_a_flipped_bit_between_two_steps_is_rolled_back_exactly():
    toy = Toy(steps=60)
    job = guarded(toy, monitors=("stray_writes",), monitor_budget=1.0)
    fired, actions = 0, []
    for step in job.steps:
        actions.append(step.action)
        if step.number == 33 and not fired:
            fired += 1
            weight = next(job.model.parameters())
            weight.data.view(-1).view(torch.int32)[5] ^= 1  # the last bit of one number
    assert fired == 1
    assert [action for action in actions if action != "apply"] == ["rollback"]
    assert job.digest() == plain(toy)[0]


def test_a_stray_write_may_be_only_told():
    job = guarded(Toy(steps=40), monitors=("stray_writes",), monitor_budget=1.0, stray_writes="alert")
    guard, told = None, []
    for step in job.steps:
        if guard is None:
            guard = job.arc._engine.guard
            guard._record = lambda **fields: told.append(fields)
        assert step.action == "apply"
        if step.number == 30:
            next(job.model.parameters()).data.view(-1)[0] += 1e-3
    assert [fields["cause"] for fields in told if fields["kind"] == "alert"] == ["stray_writes: first.weight"]


def test_a_second_moment_that_shrinks_impossibly_is_rolled_back():
    toy = Toy(steps=60)
    job = guarded(toy, monitors=("second_moment",), monitor_budget=1.0)
    fired, reasons = 0, []
    for step in job.steps:
        if step.action != "apply":
            reasons.append((step.action, step.reason.split(":")[0]))
        if step.number == 33 and not fired:
            fired += 1
            state = job.optimizers[0].state[next(job.model.parameters())]
            state["exp_avg_sq"].mul_(1e-9)  # not negative, and no norm that grew: only its decay tells
    assert fired == 1
    assert reasons == [("rollback", "optimizer_invalid")]


def test_observed_metrics_are_judged_and_survive_bad_values():
    job = guarded(Toy(steps=80), monitors=("lite",), monitor_budget=1.0)
    told = []
    for step in job.steps:
        job.arc._engine.guard._record = lambda **fields: told.append(fields)
        job.arc.observe("accuracy", 0.9 if step.number < 50 else 0.1)
        job.arc.observe("reward", math.nan if step.number == 60 else 1.0)
        assert step.action == "apply"
    causes = [fields["cause"] for fields in told if fields["kind"] == "alert"]
    assert causes == ["metric_collapse: accuracy", "metric_nonfinite: reward"]


# ---------------------------------------------------------------------- settings


def test_presets_grow_and_names_can_be_added_and_taken_away():
    assert set(LITE) < set(STANDARD) < set(FULL)
    assert chosen("lite") == LITE
    assert "effective_rank" in chosen(("standard", "effective_rank"))
    assert "replicas" not in chosen(("standard", "-replicas"))
    assert chosen(("full", "-standard")) == tuple(name for name in FULL if name not in STANDARD)
    assert chosen(()) == ()


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"monitors": "heavy"}, "no monitor 'heavy'.*lite, standard, full"),
        ({"monitors": ("standard", 3)}, "no monitor 3"),
        ({"monitor_budget": 0.0}, "monitor_budget"),
        ({"monitor_budget": 1.5}, "monitor_budget"),
        ({"compare_replicas_every": 0}, "1 or more"),
        ({"stray_writes": "stop"}, "alert, rollback"),
        ({"monitor_options": {"loss_spike": {"sigmas": -1.0}}}, "loss_spike: sigmas=-1.0"),
        ({"monitor_options": {"loss_spike": {"sigmas": "many"}}}, "sigmas='many'"),
        ({"monitor_options": {"loss_spike": {"sigma": 3}}}, "loss_spike: .*sigma"),
        ({"monitor_options": {"loss_spike": {"policy": "explode"}}}, "explode"),
        ({"monitor_options": {"replicas": {}}}, "no monitor 'replicas' with options"),
        ({"monitors": ("weight_health",), "monitor_options": {"weight_health": {"weights": (1, 1, 1)}}}, "add up to 1"),
        ({"monitors": ("label_range",)}, "label_range: .*high"),
    ],
)
def test_bad_settings_are_refused_with_a_reason(setting, rule):
    model = Net()
    with pytest.raises(ConfigError, match=rule):
        Arc(model, torch.optim.AdamW(model.parameters()), **setting)


def test_names_of_monitors_are_unique_and_needed():
    with pytest.raises(ConfigError, match="there is a monitor 'loss_spike' already"):
        register(type("Mine", (At,), {"name": "loss_spike"}))
    with pytest.raises(ConfigError, match="needs `name`"):
        register(type("Mine", (Monitor,), {"sees": Sees.WEIGHT}))
    assert Finding(Flag(0), "x", 1.0, None).flag == 0
