"""Runs the monitors of one rank: which looks at what when, within the budget, and what becomes of their findings.

Once per step, between the backward and the update, it is asked whether a look is due; mostly none is. When one is, the
monitors take turns, each with its next tensor. A finding with a flag goes into the rank's next ballot, so that all
ranks act on it alike. One without is an alert: it is told by rank 0 once all ranks know that there is one to tell.

A monitor that raises or is slow several times is switched off, and that is said once. It never stops training.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from arc_dist.checkpoint_store.codec import encode
from arc_dist.monitors.base import Finding, Monitor, Part, Sees, build, chosen
from arc_dist.monitors.batches import SeenBatch
from arc_dist.monitors.budget import Budget
from arc_dist.monitors.origin import GradientOrigin
from arc_dist.monitors.series import Point
from arc_dist.monitors.stray import StrayWrites
from arc_dist.settings import Settings
from arc_dist.snapshot.naming import named_tensors, walk
from arc_dist.snapshot.state import TrainingState
from arc_dist.snapshot.tensors import local
from arc_dist.telemetry.log import logger

_MAX_FAULTS = 3
_SLOW_S = 1.0
_MAX_LOOKS = 64  # in one step
_MAX_POINTS = 4096
_GATHERED = 16  # points that are worth a look at series; what costs little each time costs much at every short step
_AGAIN_S = 1.0  # after so long, monitors of constant cost look again whatever has gathered
_MAX_ALERTS = 32  # that wait to be told
_QUIET_STEPS = 1000  # after an alert, before the same is told again
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)

Get = Callable[[], "Part | None"]


class Monitoring:
    """The monitors that `Settings.monitors` names, and their budget.

    Args:
        state: what they look at.
        settings: which monitors, with which options, and the budget.
        sharded: parameters are shards of FSDP2.
        clock: seconds that never go back.

    Attributes:
        alerts: what waits to be told, JSON-able; see `take_alerts`.
        sees_batches: whether `batch` has anything to do.
        watches_updates: whether `updated` has anything to do.
    """

    def __init__(
        self,
        state: TrainingState,
        settings: Settings,
        *,
        sharded: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        names = chosen(settings.monitors)
        self.alerts: list[dict[str, Any]] = []
        self._state = state
        self._clock = clock
        monitors = build(names, settings.monitor_options)
        self._batch_monitors = [monitor for monitor in monitors if monitor.sees is Sees.BATCH]
        self._monitors = [monitor for monitor in monitors if monitor.sees is not Sees.BATCH]
        self._turn = 0
        self._cursors: dict[Monitor, int] = collections.defaultdict(int)
        self._parts: dict[Sees, list[Get]] = {}
        self._known: object = None
        self._points: collections.deque[tuple[str, int, float]] = collections.deque(maxlen=_MAX_POINTS)
        self._looked_at: dict[Sees, float] = {Sees.SERIES: -math.inf, Sees.GROUPS: -math.inf}  # when
        self._rests_until = -math.inf  # no monitor has anything new to see before
        self._again: tuple[int, Monitor, int] | None = None  # (step, monitor, part) of a look that was promised
        self._faults: dict[str, int] = collections.defaultdict(int)
        self._told: dict[str, int] = {}
        self._findings: list[Finding] = []
        self._step = 0
        has_stray = "stray_writes" in names
        share = settings.monitor_budget / 2 if has_stray else settings.monitor_budget
        self.budget = Budget(share, clock)
        self._stray_budget = Budget(share, clock)
        self._stray = StrayWrites(acts=settings.stray_writes == "rollback") if has_stray else None
        self._holds = False
        self.origin = self._follow_origins(sharded) if "gradient_origin" in names else None
        self._renew_flags()

    def _renew_flags(self) -> None:
        self.sees_batches = bool(self._batch_monitors)
        self.watches_updates = self._stray is not None
        self._takes_points = any(monitor.sees is Sees.SERIES for monitor in self._monitors)

    def _follow_origins(self, sharded: bool) -> GradientOrigin:
        models = self._state.models
        parameters = [(named.name, named.tensor) for named in named_tensors(models) if not named.is_buffer]
        return GradientOrigin(parameters, walk(models) if sharded else ())

    # ------------------------------------------------------------------ one step

    def is_due(self) -> bool:
        """Whether `look` has something to do now: a reading of the clock."""
        now = self._clock()
        return (now >= self.budget.next_at and now >= self._rests_until) or self._holds or self._again is not None

    def look(self, step: int) -> int:
        """Between the backward and the update: takes the looks that are due.

        Args:
            step: updates applied.

        Returns:
            The flags for the rank's next ballot.
        """
        self._step = step
        found: list[Finding] = self._compare_held(step) if self._holds else []
        promised, self._again = self._again, None
        if promised is not None and promised[0] == step and promised[1] in self._monitors:
            self._follow()
            found += self._look_at(promised[1], promised[2])
        for _ in range(_MAX_LOOKS):
            monitor = self._next() if self.budget.is_due() else None
            if monitor is None:
                break
            found += self._take_turn(monitor)
        return self._sort_out(found)

    def look_at_rest(self) -> int:
        """At the end: what no look was worth yet. Returns the flags for the rank's last ballot."""
        return self._sort_out(self._look_at_series()) if self._takes_points else 0

    def _next(self) -> Monitor | None:
        """The monitor whose turn it is, or None when none has anything new to see."""
        for _ in range(len(self._monitors)):
            self._turn %= len(self._monitors)
            monitor = self._monitors[self._turn]
            self._turn += 1
            has_gathered = monitor.sees is Sees.SERIES and len(self._points) >= _GATHERED
            looked_at = self._looked_at.get(monitor.sees)
            if looked_at is None or has_gathered or self._clock() >= looked_at + _AGAIN_S:
                return monitor
        # All of them are of constant cost, or one would have been found.
        self._rests_until = min((self._looked_at[one.sees] for one in self._monitors), default=math.inf) + _AGAIN_S
        return None

    def _take_turn(self, monitor: Monitor) -> list[Finding]:
        """One look of a monitor."""
        began = self._clock()
        if monitor.sees in self._looked_at:
            self._looked_at[monitor.sees] = began
        if monitor.sees is Sees.SERIES:
            return self._look_at_series()
        if monitor.sees is Sees.GROUPS:
            groups = [group for optimizer in self._state.optimizers for group in optimizer.param_groups]
            return self._guarded(monitor, groups, began)
        self._follow()
        parts = self._parts[monitor.sees]
        if not parts:
            self.budget.charge(began)
            return []
        place = self._cursors[monitor] % len(parts)
        self._cursors[monitor] = place + 1
        return self._look_at(monitor, place)

    def _look_at(self, monitor: Monitor, place: int) -> list[Finding]:
        began = self._clock()
        parts = self._parts[monitor.sees]
        with torch.no_grad():
            part = parts[place]() if place < len(parts) else None
            if part is None:
                self.budget.charge(began)
                return []
            found = self._guarded(monitor, part, began)
            if monitor.again():
                self._again = (self._step + 1, monitor, place)
        return found

    def _look_at_series(self) -> list[Finding]:
        """All numbers since the last time, by all monitors of series."""
        points = [Point(*point) for point in self._points]
        self._points.clear()
        found = []
        for monitor in [monitor for monitor in self._monitors if monitor.sees is Sees.SERIES]:
            found += self._guarded(monitor, points, self._clock(), each=True)
        return found

    def _guarded(self, monitor: Monitor, subject: Any, began: float, *, each: bool = False) -> list[Finding]:
        """One look, charged to the budget; what the monitor does wrong is counted against it."""
        found: list[Finding] = []
        try:
            for one in subject if each else (subject,):
                for finding in monitor.look(one):
                    if not isinstance(finding, Finding):
                        raise TypeError(f"look() gave {type(finding).__name__} instead of a Finding")
                    found.append(finding)
        except Exception as error:  # noqa: BLE001 - a monitor, perhaps the user's, never stops training
            self._count_fault(monitor, f"{type(error).__name__}: {error}")
        cost_s = self.budget.charge(began)
        if cost_s > _SLOW_S:
            self._count_fault(monitor, f"a look took {cost_s:.1f} s")
        return found

    def _count_fault(self, monitor: Monitor, reason: str) -> None:
        self._faults[monitor.name] += 1
        if self._faults[monitor.name] < _MAX_FAULTS:
            return
        self._monitors = [other for other in self._monitors if other is not monitor]
        self._batch_monitors = [other for other in self._batch_monitors if other is not monitor]
        self._renew_flags()
        told = f"monitor {monitor.name} is switched off after {_MAX_FAULTS} faults, the last: {reason}"
        self._alert(told, None, None)

    def batch(self, data: Any, *, ordinal: int, epoch: int, step: int) -> int:
        """Before the forward: shows a batch to the monitors of batches; the flags for this step's ballot."""
        self._step = step
        found: list[Finding] = []
        seen = SeenBatch(data, ordinal, epoch, step)
        with torch.no_grad():
            for monitor in list(self._batch_monitors):
                found += self._guarded(monitor, seen, self._clock())
        return self._sort_out(found)

    def accepted(self, step: int, loss: float) -> None:
        """An update was applied whose loss this was."""
        if self._takes_points:
            self._take_point("loss", step, loss)

    def metric(self, name: str, step: int, value: float) -> None:
        """The script told a number of its own."""
        if self._takes_points:
            self._take_point(name, step, value)

    def _take_point(self, name: str, step: int, value: float) -> None:
        self._points.append((name, step, value))
        if len(self._points) >= _GATHERED:
            self._rests_until = -math.inf

    # ------------------------------------------------------------------ stray writes

    def updated(self) -> None:
        """An update was applied: holds a part of the weights until before the next one, as large as time allows."""
        stray, budget = self._stray, self._stray_budget
        if stray is None or not budget.is_due():
            return
        began = self._clock()
        self._follow()
        # Half of what was saved up goes into this pass, the other into the second.
        until = began + budget.share * (began - budget.next_at) / 2
        with torch.no_grad():
            try:
                while stray.hold() and self._clock() < until:
                    pass
                self._holds = True
            except Exception as error:  # noqa: BLE001 - a dtype that cannot be hashed; never stops training
                self._drop_stray(f"{type(error).__name__}: {error}")
        budget.charge(began)

    def _compare_held(self, step: int) -> list[Finding]:
        self._holds = False
        if self._stray is None:
            return []
        began = self._clock()
        with torch.no_grad():
            found = self._stray.compare(step)
        self._stray_budget.charge(began)
        return found

    def _drop_stray(self, reason: str) -> None:
        self._stray = None
        self._holds = False
        self._renew_flags()
        self._alert(f"monitor stray_writes is switched off: {reason}", None, None)

    # ------------------------------------------------------------------ findings

    def _sort_out(self, found: Sequence[Finding]) -> int:
        flags = 0
        for finding in found:
            if finding.flag:
                flags |= finding.flag.value
                self._findings.append(finding)
            else:
                self._alert(finding.name, finding.value, finding.before)
        return flags

    def _alert(self, text: str, value: float | None, before: float | None) -> None:
        told = self._told.get(text)
        if (told is not None and self._step - told < _QUIET_STEPS) or len(self.alerts) >= _MAX_ALERTS:
            return
        if len(self._told) >= 16 * _MAX_ALERTS:
            self._told.clear()
        self._told[text] = self._step
        self.alerts.append({"step": self._step, "what": text, "value": value, "before": before})

    def take_alerts(self) -> list[dict[str, Any]]:
        """What waits to be told; the caller tells it."""
        alerts, self.alerts = self.alerts, []
        return alerts

    def take_findings(self) -> list[Finding]:
        """What the flags of this rank's ballot stand for, and where its gradient went bad; for the incident."""
        found, self._findings = self._findings, []
        return found + (self.origin.findings() if self.origin is not None else [])

    # ------------------------------------------------------------------ tensors

    def _follow(self) -> None:
        """Makes the lists of tensors anew when some came or went."""
        _, tensors = self._state.tensors()
        if tensors is self._known:
            return
        self._known = tensors
        embeddings = _embeddings(self._state.models)
        named = [one for one in named_tensors(self._state.models) if not one.is_buffer]
        names = {id(one.tensor): one.name for one in named}
        self._parts = {
            Sees.WEIGHT: [self._weight(one.name, one.tensor, id(one.tensor) in embeddings) for one in named],
            Sees.GRADIENT: [
                self._gradient(one.name, one.tensor, id(one.tensor) in embeddings)
                for one in named
                if one.tensor.requires_grad
            ],
            Sees.OPTIMIZER: list(self._optimizer_parts(names)),
        }
        if self._stray is not None:
            weights = [(one.name, _values(one.tensor)) for one in named]
            self._stray.watch([(name, values) for name, values in weights if values is not None])
            self._holds = False

    def _weight(self, name: str, parameter: torch.Tensor, is_embedding: bool) -> Get:
        def get() -> Part | None:
            values = _values(parameter)
            return None if values is None else Part(name, values, self._step, is_embedding)

        return get

    def _gradient(self, name: str, parameter: torch.Tensor, is_embedding: bool) -> Get:
        def get() -> Part | None:
            values = None if parameter.grad is None else _values(parameter.grad)
            return None if values is None else Part(name, values, self._step, is_embedding)

        return get

    def _optimizer_parts(self, names: Mapping[int, str]) -> Iterator[Get]:
        for optimizer in self._state.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})  # nothing before the first gradient
                    for field, value in state.items():
                        if isinstance(value, torch.Tensor) and value.dim():
                            name = f"{names.get(id(parameter), '?')}.{field}"
                            yield self._optimizer_part(name, field, value, group, state)

    def _optimizer_part(
        self, name: str, field: str, tensor: torch.Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> Get:
        def get() -> Part | None:
            values = _values(tensor)
            updates = state.get("step")
            number = float(updates) if isinstance(updates, (int, float, torch.Tensor)) else None
            if values is None:
                return None
            return Part(name, values, self._step, field=field, group=group, updates=number)

        return get

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What the monitors have learned."""
        states = {}
        for monitor in [*self._monitors, *self._batch_monitors]:
            try:
                state = monitor.state_dict()
                if not type(monitor).__module__.startswith("arc_dist."):
                    encode(state)
                states[monitor.name] = state
            except Exception as error:  # noqa: BLE001 - the user's monitor must not cost a snapshot
                self._count_fault(monitor, f"state_dict: {type(error).__name__}: {error}")
        if self._stray is not None:
            states["stray_writes"] = self._stray.state_dict()
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave; a monitor whose state is missing or does not fit begins anew."""
        self._points.clear()
        self._again = None
        self._holds = False
        self._findings = []
        for monitor in [*self._monitors, *self._batch_monitors]:
            monitor.forget()
            if monitor.name not in states:
                continue
            try:
                monitor.load_state_dict(states[monitor.name])
            except Exception as error:  # noqa: BLE001 - of another version, or the user's; never stops training
                logger.warning("monitor %s begins anew: its saved state does not fit (%s)", monitor.name, error)
        if self._stray is not None:
            self._stray.forget()
            if "stray_writes" in states:
                self._stray.load_state_dict(states["stray_writes"])

    def close(self) -> None:
        """Takes the hooks of `gradient_origin` away."""
        if self.origin is not None:
            self.origin.close()


def _values(tensor: torch.Tensor) -> torch.Tensor | None:
    """This rank's values as real numbers, or None where there are none to judge."""
    values = local(tensor).detach()
    if values.layout != torch.strided or values.dtype not in _FLOATING or values.is_meta or values.numel() == 0:
        return None
    return torch.view_as_real(values) if values.is_complex() else values


def _embeddings(models: Mapping[str, nn.Module]) -> set[int]:
    return {
        id(module.weight)
        for _, module in walk(models)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.weight is not None
    }


def tell(
    everyone: Sequence[Sequence[Mapping[str, Any]]], record: Callable[..., None] | None, *, generation: int
) -> None:
    """Logs and records the alerts of all ranks; on rank 0.

    Args:
        everyone: by rank.
        record: called with each.
        generation: of the processes.
    """
    for rank, alerts in enumerate(everyone):
        for alert in alerts:
            numbers = "" if alert["value"] is None else f" ({_number(alert['value'])}{_against(alert['before'])})"
            logger.warning("step %d: rank %d: %s%s", alert["step"], rank, alert["what"], numbers)
            if record is not None:
                record(
                    kind="alert",
                    step=alert["step"],
                    generation=generation,
                    ranks=[rank],
                    cause=alert["what"],
                    value=alert["value"],
                    before=alert["before"],
                    action="alert",
                )


def _number(value: float) -> str:
    return f"{value:.6g}"


def _against(before: float | None) -> str:
    return "" if before is None else f", before {_number(before)}"
