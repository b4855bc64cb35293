"""Which ranks keep copies of a rank's snapshots.

A *failure domain* is what is lost as a whole: a host, unless somebody named something larger. Domains stand in a
circle, in the order of their lowest ranks. The copies of a domain's ranks go to the domain `distance` places further
on, the next copies to the one after that, and so on; within the other domain the n-th rank's copy goes to the n-th rank
there, and round again where there are fewer. Every domain uses the same distances, so each gives to as many domains as
give to it, and with domains of one size every rank keeps copies of exactly as many ranks as keep its own.
"""

from __future__ import annotations

from collections.abc import Sequence

AUTO = -1  # copies: one where there are two failure domains or more, none where there is one


def partners(domains: Sequence[str], wanted: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """For each rank the ranks that keep copies of its snapshots, the first copy's first.

    Args:
        domains: the failure domain of each rank.
        wanted: of each rank: how many copies there shall be, or `AUTO`, and the distance of the first, 1 or more, in
            places round the circle. There is at most one copy in each other domain. Where all ranks are in one domain,
            copies that were asked for go to other ranks of it: they help when a process is lost alone.
    """
    members: dict[str, list[int]] = {}
    for rank, domain in enumerate(domains):
        members.setdefault(domain, []).append(rank)
    circle = list(members.values())
    places = {domain: place for place, domain in enumerate(members)}
    orders = {rank: order for ranks in circle for order, rank in enumerate(ranks)}
    table: list[tuple[int, ...]] = []
    for rank, (domain, (copies, distance)) in enumerate(zip(domains, wanted, strict=True)):
        if copies < AUTO or distance < 1:
            raise ValueError(f"copies={copies} must be 0 or more, or AUTO, and distance={distance} 1 or more")
        if len(circle) == 1:
            table.append(_around(rank, len(domains), max(copies, 0), distance))
            continue
        chosen = _around(places[domain], len(circle), 1 if copies == AUTO else copies, distance)
        table.append(tuple(circle[other][orders[rank] % len(circle[other])] for other in chosen))
    return tuple(table)


def _around(place: int, size: int, count: int, distance: int) -> tuple[int, ...]:
    """The next `count` places on a circle of `size`, from `distance` further on; never `place` itself, none twice."""
    turns = range(min(size, count + 1))  # one of them may be `place`
    others = [(place + distance + turn) % size for turn in turns]
    return tuple([other for other in others if other != place][:count])
