"""Which steps of a run are kept. Pure: facts, a policy and the time go in; a decision with its reason comes out.

A policy is a union of rules, and a step is kept when any of them wants it, so that adding a rule never removes more:

    last    the newest N certified steps, and everything newer than the oldest of them
    every   the first certified step of each stretch of K steps: 0, 1000, 2000, ..., or the first after each of them.
            (Not "steps divisible by K": after a rollback or a pre-emption a run may never save at one again.)
    best    the certified steps with the best values of a metric
    age     the certified steps that are younger than this

Whatever the policy says, pinned steps are kept, and so is the newest certified step: `last` is part of every policy
and at least 2, because with a single one a damaged newest checkpoint would leave nothing to restore. Uncertified and
quarantined steps are never restored by themselves, so no rule counts them; they go once they are older than what `last`
keeps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from arc_dist.errors import ConfigError

MIN_LAST = 2
_MAX_BEST = 10_000

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_EXAMPLE = "last=3,every=1000,best=loss:2,age=7d"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What retention knows of a committed step.

    Attributes:
        certified: it may be restored by itself.
        committed_at: seconds since 1970.
        metrics: values by name; those that are not finite count as missing.
        pinned: why someone wants it kept; None when nobody does.
        quarantined: why it must not be restored; None when it may.
    """

    step: int
    certified: bool
    committed_at: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    pinned: str | None = None
    quarantined: str | None = None

    @property
    def trusted(self) -> bool:
        """Whether it may be restored by itself."""
        return self.certified and self.quarantined is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Keeps the steps with the best values of a metric.

    Attributes:
        metric: its name in the step's metadata.
        largest: whether larger is better (an accuracy) or smaller (a loss).
        count: how many steps; of equal values the newer steps win.
    """

    metric: str
    largest: bool = False
    count: int = 1

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.metric) or not 1 <= self.count <= _MAX_BEST:
            raise ConfigError(
                f"retention: best={self.metric}:{self.count}: name a metric and how many, such as best=loss:2."
            )

    def __str__(self) -> str:
        return f"best={self.metric}:{self.count}" + (":max" if self.largest else "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """A policy: the union of its rules. See the module.

    Attributes:
        last: how many of the newest certified steps; at least 2.
        every: keeps one step of each stretch of this many steps; None for no such rule.
        best: the best steps, by any number of metrics.
        age_s: keeps steps younger than this; None for no such rule.
    """

    last: int = MIN_LAST
    every: int | None = None
    best: tuple[Best, ...] = ()
    age_s: float | None = None

    def __post_init__(self) -> None:
        if self.last < MIN_LAST:
            raise ConfigError(
                f"retention: last={self.last}: at least {MIN_LAST} steps are kept. With one, a damaged newest "
                "checkpoint would leave nothing to restore."
            )
        if self.every is not None and self.every < 1:
            raise ConfigError(f"retention: every={self.every}: give a number of steps, at least 1.")
        if self.age_s is not None and not (self.age_s >= 0 and math.isfinite(self.age_s)):
            raise ConfigError(f"retention: age={self.age_s}: give a time such as 7d.")

    def __str__(self) -> str:
        rules = [f"last={self.last}"]
        rules += [] if self.every is None else [f"every={self.every}"]
        rules += [str(best) for best in self.best]
        rules += [] if self.age_s is None else [f"age={format_age(self.age_s)}"]
        return ",".join(rules)


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step is kept, and why."""

    kept: bool
    why: str


def keep(steps: Sequence[StepFacts], policy: Retention, now: float) -> dict[int, str]:
    """The steps that are kept, with the reasons. `now` is in seconds since 1970.

    Raises:
        ConfigError: a step appears twice.
    """
    return {step: decision.why for step, decision in decide(steps, policy, now).items() if decision.kept}


def decide(steps: Sequence[StepFacts], policy: Retention, now: float) -> dict[int, Decision]:
    """As `keep`, with the reasons for removal too, oldest step first."""
    ordered = sorted(steps, key=lambda s: s.step)
    if len({s.step for s in ordered}) != len(ordered):
        raise ConfigError("retention: a step appears twice. Give the facts of each step once.")
    trusted = [s for s in ordered if s.trusted]
    reasons: dict[int, list[str]] = {s.step: [] for s in ordered}
    for fact in ordered:
        if fact.pinned is not None:
            reasons[fact.step].append(f"pinned: {fact.pinned}" if fact.pinned else "pinned")
    rules: list[Callable[[], Iterable[tuple[int, str]]]] = [lambda: _last(ordered, trusted, policy.last)]
    if policy.every is not None:
        rules.append(lambda: _every(trusted, policy.every or 1))
    rules += [lambda best=best: _best(trusted, best) for best in policy.best]
    if policy.age_s is not None:
        rules.append(lambda: _young(trusted, policy.age_s or 0.0, now))
    for rule in rules:
        for step, why in rule():
            reasons[step].append(why)
    return {
        fact.step: Decision(True, "; ".join(reasons[fact.step]))
        if reasons[fact.step]
        else Decision(False, _why_removed(fact, policy))
        for fact in ordered
    }


def _last(ordered: Sequence[StepFacts], trusted: Sequence[StepFacts], count: int) -> Iterable[tuple[int, str]]:
    newest = [s.step for s in trusted[-count:]]
    if not newest:
        yield from ((s.step, "no step is certified yet") for s in ordered)
        return
    # While there are fewer than `count`, what is older may still be all that a person has.
    oldest = newest[0] if len(newest) == count else ordered[0].step
    for fact in ordered:
        if fact.step == newest[-1]:
            yield fact.step, "the newest certified step"
        elif fact.step in newest:
            yield fact.step, f"one of the newest {count} certified steps"
        elif fact.step >= oldest:
            newer = f"newer than step {oldest}, the oldest of the newest {count} certified steps"
            yield fact.step, newer if len(newest) == count else f"fewer than {count} steps are certified"


def _every(trusted: Sequence[StepFacts], every: int) -> Iterable[tuple[int, str]]:
    seen: set[int] = set()
    for fact in trusted:
        stretch = fact.step // every
        if stretch not in seen:
            seen.add(stretch)
            yield fact.step, f"the first certified step from {stretch * every} on (every {every})"


def _best(trusted: Sequence[StepFacts], best: Best) -> Iterable[tuple[int, str]]:
    sign = -1.0 if best.largest else 1.0
    known = [s for s in trusted if math.isfinite(s.metrics.get(best.metric, math.nan))]
    ranked = sorted(known, key=lambda s: (sign * s.metrics[best.metric], -s.step))
    for place, fact in enumerate(ranked[: best.count], start=1):
        extreme = "largest" if best.largest else "smallest"
        yield fact.step, f"{best.metric} {fact.metrics[best.metric]:.6g}, number {place} of the {extreme}"


def _young(trusted: Sequence[StepFacts], age_s: float, now: float) -> Iterable[tuple[int, str]]:
    for fact in trusted:
        if now - fact.committed_at <= age_s:  # a commit from the future (a clock that was wrong) is young
            yield fact.step, f"younger than {format_age(age_s)}"


def _why_removed(fact: StepFacts, policy: Retention) -> str:
    older = f"older than the newest {policy.last} certified steps"
    if fact.quarantined is not None:
        return f"quarantined ({fact.quarantined}) and {older}"
    if not fact.certified:
        return f"uncertified and {older}"
    return f"{older}, and no other rule keeps it"


def parse_retention(text: str) -> Retention:
    """Reads the text form: rules between commas, such as ``last=3,every=1000,best=loss:2,best=acc:1:max,age=7d``.

    ``best`` may be given several times: ``best=METRIC[:COUNT][:min|max]``. Ages are numbers with s, m, h, d or w.

    Raises:
        ConfigError: what is wrong, with an example.
    """
    values: dict[str, str] = {}
    best: list[Best] = []
    for rule in text.split(","):
        key, equals, value = (part.strip() for part in rule.partition("="))
        if not equals or not value:
            raise _unclear(text, f"{rule.strip()!r} is not NAME=VALUE")
        if key == "best":
            best.append(_parse_best(text, value))
        elif key not in ("last", "every", "age"):
            raise _unclear(text, f"there is no rule {key!r}; there are last, every, best and age")
        elif key in values:
            raise _unclear(text, f"{key} appears twice")
        else:
            values[key] = value
    return Retention(
        last=_parse_count(text, "last", values["last"]) if "last" in values else MIN_LAST,
        every=_parse_count(text, "every", values["every"]) if "every" in values else None,
        best=tuple(best),
        age_s=parse_age(values["age"]) if "age" in values else None,
    )


def parse_age(text: str) -> float:
    """``"7d"`` -> seconds. ConfigError when it is no number with one of s, m, h, d and w."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a time: give a number with s, m, h, d or w, such as 90m or 7d.")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def format_age(seconds: float) -> str:
    """The shortest form that `parse_age` reads back to the same number."""
    for unit in ("w", "d", "h", "m"):
        count = seconds / _SECONDS[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds:f}".rstrip("0") + "s"


def _parse_best(text: str, value: str) -> Best:
    metric, *rest = (part.strip() for part in value.split(":"))
    largest = False
    if rest and rest[-1] in ("min", "max"):
        largest = rest.pop() == "max"
    if len(rest) > 1:
        raise _unclear(text, f"best={value} is not METRIC[:COUNT][:min|max]")
    return Best(metric=metric, largest=largest, count=_parse_count(text, "best", rest[0]) if rest else 1)


def _parse_count(text: str, key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", value):
        raise _unclear(text, f"{key}={value}: {value!r} is not a whole number")
    return int(value)


def _unclear(text: str, why: str) -> ConfigError:
    return ConfigError(f"retention {text!r}: {why}. Example: {_EXAMPLE}")
