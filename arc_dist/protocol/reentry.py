"""Whether a training process may stay when its generation ends, and go on in the next one.

As a rule the processes of a generation end with it. One whose function can be entered again need not: it drops all
that belongs to the old generation, says so, and is told the next one. Its supervisor keeps a `Stay` about it::

              began(g)           asked             left(g)           entering(h)           began(h)
    OUTSIDE -----------> INSIDE -------> ASKED ---------------> LEFT -------------> ENTERING ---------> INSIDE
                            |                                     ^
                            +---------- left(g): it lost a peer --+       from anywhere: stuck, ended

A process in LEFT runs nothing of its old generation, so its supervisor may say `ready` for the next as if the process
were gone: still one live process per rank, and none of an older generation. In every other standing it must be ended
first. What a process says of another generation than the one that it is in changes nothing: a late word must not make
a process pass for one that has left.

**Bounds.** A process has `within_s` to leave, and again to enter. One that came back and left again without a step,
`MAX_BARREN` times in a row, is ended: what is wrong may be in the process, and a new one does not have it.
"""

from __future__ import annotations

import dataclasses
import enum

MAX_BARREN = 2


class Standing(enum.Enum):
    """Where a process is between two generations."""

    OUTSIDE = "outside"  # in code that cannot be entered again
    INSIDE = "inside"
    ASKED = "asked"  # to leave
    LEFT = "left"
    ENTERING = "entering"  # told to, and has not said yet that it does
    STUCK = "stuck"  # it cannot get rid of its old generation, as it says itself


class Choice(enum.Enum):
    """What is to be done with the process of a generation that ends, or that is to begin."""

    ASK = "ask"
    WAIT = "wait"
    KEEP = "keep"
    END = "end"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stay:
    """What a supervisor knows of its process.

    Attributes:
        standing: see above.
        generation: that it is in, has left, or is to enter.
        within_s: how long it may take to leave, and to enter, in seconds.
        since_s: when it was asked, or told to enter.
        has_stayed: it entered its present generation without a new process.
        barren: times in a row that it came back and left again without a step.
        reason: why it is stuck.
    """

    standing: Standing = Standing.OUTSIDE
    generation: int = -1
    within_s: float = 0.0
    since_s: float = 0.0
    has_stayed: bool = False
    barren: int = 0
    reason: str = ""


def began(stay: Stay, generation: int, within_s: float) -> Stay:
    """It says that its function runs, in `generation`."""
    if stay.standing is Standing.OUTSIDE:
        return Stay(standing=Standing.INSIDE, generation=generation, within_s=within_s)
    if stay.standing is Standing.ENTERING and generation == stay.generation:
        return dataclasses.replace(stay, standing=Standing.INSIDE, within_s=within_s, has_stayed=True)
    return stay


def asked(stay: Stay, now_s: float) -> Stay:
    """It is asked to leave the generation that it is in."""
    assert stay.standing is Standing.INSIDE, stay
    return dataclasses.replace(stay, standing=Standing.ASKED, since_s=now_s)


def left(stay: Stay, generation: int, *, progressed: bool) -> Stay:
    """It says that nothing of `generation` is left in it.

    Args:
        stay: of the process.
        generation: the one that it was in.
        progressed: a step was committed in that generation.
    """
    if generation != stay.generation or stay.standing not in (Standing.INSIDE, Standing.ASKED):
        return stay
    barren = stay.barren + 1 if stay.has_stayed and not progressed else 0
    return dataclasses.replace(stay, standing=Standing.LEFT, has_stayed=False, barren=barren)


def stuck(stay: Stay, generation: int, reason: str) -> Stay:
    """It says that it cannot get rid of `generation`."""
    if generation != stay.generation or stay.standing not in (Standing.INSIDE, Standing.ASKED):
        return stay
    return dataclasses.replace(stay, standing=Standing.STUCK, reason=reason)


def entering(stay: Stay, generation: int, now_s: float) -> Stay:
    """It is told to enter `generation`."""
    assert stay.standing is Standing.LEFT and generation > stay.generation, stay
    return dataclasses.replace(stay, standing=Standing.ENTERING, generation=generation, since_s=now_s)


def ended(stay: Stay) -> Stay:
    """Its function returned or raised, or the process is gone."""
    return Stay()


def choose(stay: Stay, now_s: float) -> tuple[Choice, str]:
    """What to do with the process, and why, for the log; `KEEP` only of one that has left."""
    if stay.standing is Standing.INSIDE:
        return Choice.ASK, "its function can be entered again"
    if stay.standing in (Standing.ASKED, Standing.ENTERING):
        if now_s < stay.since_s + stay.within_s:
            return Choice.WAIT, ""
        verb = "leave" if stay.standing is Standing.ASKED else "enter"
        return Choice.END, f"it did not {verb} generation {stay.generation} within {stay.within_s:g} s"
    if stay.standing is Standing.LEFT:
        if stay.barren >= MAX_BARREN:
            return Choice.END, f"it came back {stay.barren} times without a step"
        return Choice.KEEP, ""
    return Choice.END, stay.reason or "its code cannot be entered again"
